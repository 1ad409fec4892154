"""What a run achieved, in one glance and one file."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_only

from ibro_lightning.callbacks.say import say
from ibro_lightning.modules import PolicyModule
from ibro_lightning.run_folders import run_folder, write_json
from ibro_lightning.version import __version__


class RunSummary(pl.Callback):
    """Prints accuracy before → after, time and places, and writes them to ``summary.json``.

    "Before" is the evaluation that precedes training, "after" the last one. With several evaluation sets the accuracy
    is the mean of their avg@k; each set's own numbers are in ``evaluations``. A later evaluation in the same process
    (the command line runs one if training did not end with one) brings the file up to date. "Before" and the time
    spent are part of the checkpoint, so a resumed run sums up the whole run.
    """

    def __init__(self) -> None:
        self.before: dict[str, Any] = {}
        self.after: dict[str, Any] = {}
        self._seconds_before_resume = 0.0
        self._started = time.perf_counter()
        self._fitted = self._written = False

    def state_dict(self) -> dict[str, Any]:
        return {"before": self.before, "seconds": self._seconds}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.before, self._seconds_before_resume = state_dict["before"], state_dict["seconds"]

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._started = time.perf_counter()

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not isinstance(pl_module, PolicyModule):
            return
        evaluations = {name: evaluation.to_json() for name, evaluation in pl_module.evaluations.items()}
        if trainer.sanity_checking:
            self.before = evaluations
        self.after = evaluations
        if self._fitted:
            self._write(trainer, pl_module)

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._fitted = True
        if isinstance(pl_module, PolicyModule) and pl_module.evaluation_is_current:
            self._write(trainer, pl_module)  # otherwise the evaluation that follows does

    def finish(self, trainer: pl.Trainer, pl_module: PolicyModule) -> None:
        """Write now if it has not happened, whatever became of the evaluation."""
        if not self._written:
            self._write(trainer, pl_module)

    @property
    def _seconds(self) -> float:
        return self._seconds_before_resume + time.perf_counter() - self._started

    @rank_zero_only
    def _write(self, trainer: pl.Trainer, module: PolicyModule) -> None:
        folder = run_folder(trainer)
        before, after = _accuracy(self.before), _accuracy(self.after)
        summary: dict[str, Any] = {
            "accuracy_before": before,
            "accuracy_after": after,
            "seconds": round(self._seconds, 1),
            "iterations": module.iteration,
            "optimizer_steps": trainer.global_step,
            "model_dir": str(folder / "model") if (folder / "model").is_dir() else None,
            "log_dir": str(folder),
            "version": __version__,
            "evaluations": {"before": self.before, "after": self.after},
        }
        write_json(folder / "summary.json", summary)
        self._written = True
        change = "" if before is None or after is None else f"accuracy  {before:.1%} → {after:.1%}\n"
        warning = "" if trainer.global_step else "warning   no optimizer step was taken: the policy is unchanged\n"
        say(
            trainer,
            f"\n{change}{warning}"
            f"time      {summary['seconds']:.0f} s, {module.iteration} iterations\n"
            f"model     {summary['model_dir']}\n"
            f"curves    tensorboard --logdir {folder}\n"
            f"summary   {folder / 'summary.json'}",
        )


def _accuracy(evaluations: Mapping[str, Any]) -> float | None:
    if not evaluations:
        return None
    return sum(evaluation["avg_at_k"]["mean"] for evaluation in evaluations.values()) / len(evaluations)
