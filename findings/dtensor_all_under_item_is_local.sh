#!/usr/bin/env bash
# torch 2.13.0: `.isfinite().all()` of a sharded DTensor, read as a Python bool, is each rank's own answer.
# Guess: a DTensor stands for the whole tensor, so a reduction of it to one number is the whole tensor's on every rank.
# What happens: with the inf in the second rank's shard, rank 0 reads True and rank 1 False; `.sum().item()` is 3.0 on one
# and inf on the other. Two ranks that decide by it whether to take an optimizer step part ways. `full_tensor()` first
# gives the guess.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet torch==2.13.0 numpy==2.4.6
cat > "$work/two_ranks.py" <<'PY'
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor


def run(rank, store):
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    whole = torch.tensor([1.0, 2.0, 3.0, float("inf")])  # [1, 2] on rank 0, [3, inf] on rank 1
    sharded = distribute_tensor(whole, init_device_mesh("cpu", (2,)), [Shard(0)])
    finite = sharded.isfinite().all()
    own = (bool(finite), sharded.sum().item(), bool(finite.full_tensor()))
    answers = [None, None]
    dist.all_gather_object(answers, own)
    if rank == 0:
        print(f"torch {torch.__version__}")
        for number, (local, total, gathered) in enumerate(answers):
            print(f"rank {number}: bool(isfinite().all()) {local}, sum().item() {total}, after full_tensor() {gathered}")
        assert answers == [(True, 3.0, False), (False, float("inf"), False)], answers
    dist.destroy_process_group()


if __name__ == "__main__":
    mp.spawn(run, (str(Path(sys.argv[1]) / "store"),), nprocs=2)
PY
"$work/venv/bin/python" "$work/two_ranks.py" "$work"
echo "still so"
