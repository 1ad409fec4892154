#!/usr/bin/env bash
# Several machines without a scheduler: run this, with the same values, on each of them.
#
#   NODES=2 RENDEZVOUS=node0:29400 launch/torchrun.sh dapo_ib.yaml [any other setting …]
#
# The machines need the same code and recipe, and the run's folder (trainer.default_root_dir) on a file system that they
# share. They may be started in any order, within torchrun's ten minutes; when one stops, all do. To go on after that,
# run it again on each of them with --ckpt_path last.
#
# Environment:
#   NODES       how many machines (default 1)
#   DEVICES     GPUs of each (default 8)
#   RENDEZVOUS  host:port of one of them, reachable from all; the port must be free there
#   RUN_ID      the same on all, and another one for each run that uses this port (default: ibro)
#   LOCAL_ADDR  this machine's address, if its host name does not lead the others to it
set -euo pipefail
recipe=${1:?which recipe? e.g. launch/torchrun.sh dapo_ib.yaml}
shift
nodes=${NODES:-1}
devices=${DEVICES:-8}
[[ $nodes == 1 || -n ${RENDEZVOUS:-} ]] || { echo "RENDEZVOUS: not set - write host:port of one machine" >&2; exit 2; }
# Asked to stop, torchrun kills its workers after so many seconds: an update must end and a checkpoint be written first.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-1800}
exec python -m torch.distributed.run \
  --nnodes "$nodes" --nproc-per-node "$devices" \
  --rdzv-backend c10d --rdzv-endpoint "${RENDEZVOUS:-localhost:0}" --rdzv-id "${RUN_ID:-ibro}" \
  ${LOCAL_ADDR:+--local-addr "$LOCAL_ADDR"} \
  -m ibro_lightning fit --config "$recipe" \
  --trainer.num_nodes "$nodes" --trainer.devices "$devices" "$@"
