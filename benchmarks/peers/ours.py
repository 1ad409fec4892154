"""Our side: ``fit`` with a callback that records what each iteration took and did.

python -m peers.ours JOB.json
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from importlib.metadata import version
from itertools import groupby
from typing import Any

import lightning.pytorch as pl
import torch

from ibro_lightning import timing
from ibro_lightning.batches import Rollout
from ibro_lightning.cli.main import main
from peers.work import Iteration, Job, Report, cpu_seconds, peak_mib


class CpuClock:
    """Stands in for the module ``time``, so that our phases are measured in CPU seconds of the main process."""

    perf_counter = staticmethod(time.process_time)

    def __getattr__(self, name: str) -> Any:
        return getattr(time, name)


class Recorder(pl.Callback):
    """Writes a report: one record per iteration, from the end of the one before to its own.

    Args:
        report: the file.
        side: whose report it is.
    """

    def __init__(self, report: str, side: str) -> None:
        self.report, self.side = report, side
        self.iterations: list[Iteration] = []

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._mark = (cpu_seconds(), time.perf_counter(), trainer.global_step)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Rollout, batch_idx: int
    ) -> None:
        measured = {**batch.metrics, **outputs}
        phases = {
            name.removeprefix("time/").removesuffix("_s"): float(seconds)
            for name, seconds in measured.items()
            if name.startswith("time/")
        }
        rows = zip(batch.groups.tolist(), batch.prompts, batch.completions, batch.accuracy.tolist(), strict=True)
        groups = [list(group) for _, group in groupby(rows, key=lambda row: row[0])]
        self._did = {
            "prompts": [group[0][1].id for group in groups],
            "prompt_tokens": [len(group[0][1].token_ids) for group in groups],
            "completions": len(batch),
            "lengths": [sum(len(row[2].token_ids) for row in group) / len(group) for group in groups],
            "accuracies": [sum(row[3] for row in group) / len(group) for group in groups],
            "phases": phases,
        }

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """One epoch is one iteration; by now the other callbacks have had its batch, too."""
        before, self._mark = self._mark, (cpu_seconds(), time.perf_counter(), trainer.global_step)
        cpu_s, wall_s, steps = (now - then for now, then in zip(self._mark, before, strict=True))
        self.iterations.append(Iteration(cpu_s, wall_s, optimizer_steps=int(steps), **self._did))

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        versions = {name: version(name) for name in ("torch", "transformers", "lightning")}
        Report(self.side, self.iterations, peak_mib(), torch.get_num_threads(), versions).write(self.report)


def run(job: Job) -> None:
    timing.time = CpuClock()  # type: ignore[assignment]
    with tempfile.TemporaryDirectory() as folder:
        recorder = f"--trainer.callbacks+={Recorder.__module__}.Recorder"
        main(
            [
                *("fit", "--config", job.recipe, "--model.policy", job.policy),
                *("--seed_everything", str(job.seed), "--trainer.max_epochs", str(job.iterations)),
                *("--trainer.default_root_dir", f"{folder}/run", "--trainer.enable_progress_bar", "false"),
                *("--num_threads", os.environ["OMP_NUM_THREADS"]),
                *(recorder, f"--trainer.callbacks.report={job.report}", f"--trainer.callbacks.side={job.side}"),
                *job.arguments,
            ]
        )


if __name__ == "__main__":
    from peers import ours  # the module that the command line will import, not this one under another name

    ours.run(Job.read(sys.argv[1]))
