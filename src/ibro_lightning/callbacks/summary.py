"""What a run achieved, in one glance and one file."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_only

from ibro_lightning.callbacks.run_folder import run_folder, write_json
from ibro_lightning.metrics import Evaluation
from ibro_lightning.modules import PolicyModule
from ibro_lightning.version import __version__


class RunSummary(pl.Callback):
    """Prints accuracy before → after, time and places, and writes them to ``summary.json``.

    "Before" is the evaluation that precedes training, "after" the last one. With several evaluation sets the accuracy
    is the mean of their avg@k; each set's own numbers are in ``evaluations``. A later evaluation in the same process
    (the command line runs one if training did not end with one) brings the file up to date.
    """

    def __init__(self) -> None:
        self.before: dict[str, Evaluation] = {}
        self.after: dict[str, Evaluation] = {}
        self._started = time.perf_counter()
        self._seconds: float | None = None
        self._iterations = 0

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._started = time.perf_counter()

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not isinstance(pl_module, PolicyModule):
            return
        if trainer.sanity_checking:
            self.before = dict(pl_module.evaluations)
            return
        self.after = dict(pl_module.evaluations)
        if self._seconds is not None:
            self._write(trainer)

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._seconds = time.perf_counter() - self._started
        self._iterations = trainer.current_epoch
        if self.after or not self.before:  # otherwise an evaluation follows
            self._write(trainer)

    @rank_zero_only
    def _write(self, trainer: pl.Trainer) -> None:
        folder = run_folder(trainer)
        before, after = _accuracy(self.before), _accuracy(self.after)
        summary: dict[str, Any] = {
            "accuracy_before": before,
            "accuracy_after": after,
            "seconds": round(self._seconds or 0.0, 1),
            "iterations": self._iterations,
            "model_dir": str(folder / "model") if (folder / "model").is_dir() else None,
            "log_dir": str(folder),
            "version": __version__,
            "evaluations": {
                "before": {name: evaluation.to_json() for name, evaluation in self.before.items()},
                "after": {name: evaluation.to_json() for name, evaluation in self.after.items()},
            },
        }
        write_json(folder / "summary.json", summary)
        change = "" if before is None or after is None else f"accuracy  {before:.1%} → {after:.1%}\n"
        text = (
            f"\n{change}time      {summary['seconds']:.0f} s, {self._iterations} iterations\n"
            f"model     {summary['model_dir']}\n"
            f"curves    tensorboard --logdir {folder}\nsummary   {folder / 'summary.json'}"
        )
        bar = trainer.progress_bar_callback
        (bar.print if bar is not None else print)(text)


def _accuracy(evaluations: Mapping[str, Evaluation]) -> float | None:
    if not evaluations:
        return None
    return sum(evaluation.avg_at_k.mean for evaluation in evaluations.values()) / len(evaluations)
