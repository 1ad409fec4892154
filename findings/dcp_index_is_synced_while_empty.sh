#!/usr/bin/env bash
# torch 2.13.0: torch.distributed.checkpoint syncs the index of a checkpoint to the disk before a byte of it is written.
# Guess: FileSystemWriter(sync_files=True), the default, has all files on the disk when save() returns, its index included.
# What happens: os.fsync is called for .metadata.tmp while its bytes are still in Python's buffer, so 0 bytes are synced;
# they are written when the file is closed, and the file gets its name. After a power failure the data of a checkpoint can
# be whole and its index empty. The files of data are flushed first.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet torch==2.13.0 numpy==2.4.6
cat > "$work/sync.py" <<'PY'
import os
import sys
import warnings
from pathlib import Path

warnings.simplefilter("ignore")
import torch
from torch.distributed.checkpoint import FileSystemWriter, save

folder = Path(sys.argv[1]) / "checkpoint"
synced = {}
fsync = os.fsync


def noting(descriptor):
    name = Path(os.readlink(f"/proc/self/fd/{descriptor}")).name
    synced[name] = os.fstat(descriptor).st_size
    fsync(descriptor)


os.fsync = noting
save({"weight": torch.randn(100)}, storage_writer=FileSystemWriter(folder, sync_files=True), no_dist=True)
written = {path.name: path.stat().st_size for path in folder.iterdir()}
print(f"torch {torch.__version__}")
print(f"bytes that were synced:  {synced}")
print(f"bytes that were written: {written}")
assert synced[".metadata.tmp"] == 0, synced
assert written[".metadata"] > 0, written
assert synced["__0_0.distcp"] == written["__0_0.distcp"] > 0, (synced, written)
PY
"$work/venv/bin/python" "$work/sync.py" "$work"
echo "still so"
