"""Whether memory and time stay flat over a long run: a thousand iterations of a tiny setting, with checkpoints,
evaluations and logs.

    python benchmarks/long_run.py                     # a few minutes
    python benchmarks/long_run.py --iterations 5000 --others "--data.max_staleness 1 --model.old_logp policy"

Prints, for each part of the run, the resident memory of all its processes (largest of the part, MiB) and the wall and
CPU seconds of an iteration (medians; CPU of the trainer). Fails if memory after a tenth of the run leaves a band of
± 20 MiB around its median, or if CPU time per iteration of the last tenth is more than a quarter above the second's.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import psutil

BAND_MIB = 20.0
SLOWER = 1.25
SETTINGS = """
num_threads: 1
trainer: {check_val_every_n_epoch: 100}
checkpoint: {every_n_iterations: 50}
model:
  init_args:
    policy:
      class_path: Qwen2FromScratch
      init_args:
        task: {class_path: ibro_lightning.tasks.NumberPath}
        hidden_size: 32
        num_layers: 1
        num_heads: 2
        num_kv_heads: 1
    mini_batch_prompts: 2
data:
  init_args:
    sampling: {max_tokens: 16}
    prompts_per_rollout: 4
    group_size: 4
    dynamic_sampling: null
    eval_sets:
      number_path:
        source: {class_path: NumberPathSource, init_args: {split: heldout, min_distance: 1, max_distance: 2}}
        reward: {class_path: NumberPathReward}
        samples: 1
        sampling: {max_tokens: 16}
"""
"""Over ``quickstart.yaml``."""


class Watch(pl.Callback):
    """Writes resident memory (MiB, of the process and its children), and wall and CPU seconds, after each iteration."""

    def __init__(self, file: str) -> None:
        self.file = file

    def on_train_batch_end(self, *_: Any, **__: Any) -> None:
        own = psutil.Process()
        processes = [own, *own.children(recursive=True)]
        resident = sum(process.memory_info().rss for process in processes) / 2**20
        with Path(self.file).open("a") as file:
            file.write(f"{resident} {time.monotonic()} {time.process_time()}\n")


def run(folder: Path, iterations: int, others: Sequence[str]) -> list[tuple[float, float, float]]:
    """Resident memory, wall and CPU seconds of each iteration but the first."""
    watched = folder / "watch.txt"
    watch = ["--trainer.callbacks+=long_run.Watch", f"--trainer.callbacks.file={watched}"]
    length = [f"--trainer.max_epochs={iterations}", f"--trainer.default_root_dir={folder / 'run'}"]
    paths = [str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    (settings := folder / "settings.yaml").write_text(SETTINGS)
    recipes = ["--config", "quickstart.yaml", "--config", str(settings)]
    command = [sys.executable, "-m", "ibro_lightning", "fit", *recipes, *length, *watch, *others]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        raise SystemExit(done.stdout)
    rows = [[float(value) for value in line.split()] for line in watched.read_text().splitlines()]
    return [(end[0], end[1] - start[1], end[2] - start[2]) for start, end in pairwise(rows)]


def verdicts(measured: Sequence[tuple[float, float, float]]) -> list[str]:
    """What is not flat."""
    tenth = len(measured) // 10
    resident = [row[0] for row in measured[tenth:]]
    off = max(abs(value - statistics.median(resident)) for value in resident)
    parts = measured[tenth : 2 * tenth], measured[-tenth:]
    second, last = (statistics.median(row[2] for row in part) for part in parts)
    found = [f"memory leaves its median by {off:.1f} MiB"] if off > BAND_MIB else []
    return found + ([f"CPU time per iteration grows {last / second:.2f} times"] if last > SLOWER * second else [])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--iterations", type=int, default=1000, help="at least 20")
    parser.add_argument("--others", default="", help="further arguments of fit, in one text")
    options = parser.parse_args()
    if options.iterations < 20:
        parser.error(f"--iterations: {options.iterations} - write 20 or more: parts are tenths")
    with tempfile.TemporaryDirectory() as folder:
        measured = run(Path(folder), options.iterations, options.others.split())
    print("iterations        largest MiB  wall s / iteration  CPU s / iteration")
    tenth = len(measured) // 10
    for start in range(0, 10 * tenth, tenth):
        part = measured[start : start + tenth]
        largest, (_, wall, cpu) = max(row[0] for row in part), map(statistics.median, zip(*part, strict=True))
        print(f"{start + 2:6} - {start + tenth + 1:6}  {largest:13.1f}  {wall:18.4f}  {cpu:17.4f}")
    failed = verdicts(measured)
    print("flat: " + ("; ".join(failed) if failed else "yes"))
    raise SystemExit(bool(failed))


if __name__ == "__main__":
    main()
