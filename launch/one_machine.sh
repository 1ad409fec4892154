#!/usr/bin/env bash
# Several GPUs of one machine: Lightning starts one process for each.
#
#   DEVICES=8 launch/one_machine.sh dapo_ib.yaml [--trainer.strategy ddp] [any other setting …]
#
# Environment: DEVICES, how many (default 8).
set -euo pipefail
recipe=${1:?which recipe? e.g. launch/one_machine.sh dapo_ib.yaml}
shift
exec python -m ibro_lightning fit --config "$recipe" \
  --trainer.devices "${DEVICES:-8}" "$@"
