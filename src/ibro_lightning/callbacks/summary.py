"""The summary of a run, printed and in a file."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_only

from ibro_lightning import __version__
from ibro_lightning.callbacks.export_model import ExportModel
from ibro_lightning.callbacks.needs import EvaluatedModule, warn_unless
from ibro_lightning.callbacks.say import say
from ibro_lightning.guards.disk import write_json
from ibro_lightning.runs.folder import callbacks_of, claim_for, evaluation_counts, is_fast_dev_run, run_folder
from ibro_lightning.runs.loggers import places


class RunSummary(pl.Callback):
    """Prints accuracy before → after, time and paths, and writes them to ``summary.json``.

    "Before" is the evaluation before training, if it is complete (``num_sanity_val_steps=-1``, which the command line
    sets; a Trainer's default of 2 batches is not), "after" the last one. With several evaluation sets the accuracy is
    the mean of their avg@k; ``evaluations`` has each set's numbers. A later evaluation in the same process (the command
    line runs one if training did not end with one) updates the file. "Before" and the time spent are part of the
    checkpoint, so the summary of a resumed run covers the whole run.
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

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage == TrainerFn.FITTING:
            warn_unless(self, pl_module, EvaluatedModule, "evaluations, iteration and evaluation_is_current")
            claim_for(trainer, "summary.json")

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._started = time.perf_counter()

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not isinstance(pl_module, EvaluatedModule):
            return
        evaluations = {name: evaluation.to_json() for name, evaluation in pl_module.evaluations.items()}
        if not evaluation_counts(trainer):
            return
        if trainer.sanity_checking:
            self.before = evaluations
        self.after = evaluations
        if self._fitted:
            self._write(trainer, pl_module)

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._fitted = True
        if isinstance(pl_module, EvaluatedModule):
            # On the command line an evaluation may follow, which completes the summary.
            complete = pl_module.evaluation_is_current or not trainer.enable_validation
            self._write(trainer, pl_module, complete=complete)

    def finish(self, trainer: pl.Trainer, pl_module: EvaluatedModule) -> None:
        """Write the summary if it has not been written, even if the evaluation failed."""
        if not self._written:
            self._write(trainer, pl_module)

    @property
    def _seconds(self) -> float:
        return self._seconds_before_resume + time.perf_counter() - self._started

    @rank_zero_only
    def _write(self, trainer: pl.Trainer, module: EvaluatedModule, *, complete: bool = True) -> None:
        if is_fast_dev_run(trainer):
            return
        folder, curves = run_folder(trainer), places(trainer.loggers)
        before, after = _accuracy(self.before), _accuracy(self.after)
        summary: dict[str, Any] = {
            "accuracy_before": before,
            "accuracy_after": after,
            "seconds": round(self._seconds, 1),
            "iterations": module.iteration,
            "optimizer_steps": trainer.global_step,
            "model_dir": _model_folder(trainer),
            "log_dir": str(folder),
            "curves": curves,
            "version": __version__,
            "evaluations": {"before": self.before, "after": self.after},
        }
        write_json(folder / "summary.json", summary)
        if not complete:
            return
        self._written = True
        change = "" if before is None or after is None else f"accuracy  {before:.1%} → {after:.1%}\n"
        warning = "" if trainer.global_step else "warning   no optimizer step was taken: the policy is unchanged\n"
        model = f"model     {summary['model_dir']}\n" if summary["model_dir"] else ""
        say(
            trainer,
            f"\n{change}{warning}"
            f"time      {summary['seconds']:.0f} s, {module.iteration} iterations\n"
            f"{model}"
            f"{''.join(f'curves    {place}' + chr(10) for place in curves)}"
            f"summary   {folder / 'summary.json'}",
        )


def _model_folder(trainer: pl.Trainer) -> str | None:
    """The exported model's folder, which is not ``model/`` if foreign files have that name; None if there is none."""
    written = next((export.written for export in callbacks_of(trainer, ExportModel) if export.written), None)
    usual = run_folder(trainer) / "model"
    return str(written or usual) if written or usual.is_dir() else None


def _accuracy(evaluations: Mapping[str, Any]) -> float | None:
    if not evaluations:
        return None
    return sum(evaluation["avg_at_k"]["mean"] for evaluation in evaluations.values()) / len(evaluations)
