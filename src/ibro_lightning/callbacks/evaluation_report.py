"""The results at the end of an evaluation, as a table and as JSON."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import lightning.pytorch as pl
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_only

from ibro_lightning.callbacks.needs import EvaluatedModule, warn_unless
from ibro_lightning.callbacks.say import say
from ibro_lightning.evaluation.metrics import Estimate, Evaluation
from ibro_lightning.guards.disk import write_json
from ibro_lightning.runs.folder import claim_for, evaluation_counts, evaluation_name, is_fast_dev_run, run_folder
from ibro_lightning.runs.samples_manifest import mark_complete


class EvaluationReport(pl.Callback):
    """Prints avg@k, pass@k and maj@k with 95 % bootstrap intervals and writes them to ``evaluations/*.json``.

    The datamodule writes the samples to the folder of the same name; ``validate`` and ``test`` also write curves for
    TensorBoard there.
    """

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage != TrainerFn.PREDICTING:
            warn_unless(self, pl_module, EvaluatedModule, "evaluations, iteration and evaluation_is_current")
            claim_for(trainer, "evaluations")

    @rank_zero_only
    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if isinstance(pl_module, EvaluatedModule):
            iteration = pl_module.iteration
            when = f" after {iteration} iteration{'s' * (iteration > 1)}" * bool(iteration)
            if trainer.sanity_checking:
                when = " before training" if evaluation_counts(trainer) else ": a check, which is not recorded"
            self._report(trainer, pl_module, f"evaluation{when}")

    @rank_zero_only
    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if isinstance(pl_module, EvaluatedModule):
            self._report(trainer, pl_module, "test")

    def _report(self, trainer: pl.Trainer, module: EvaluatedModule, title: str) -> None:
        if not module.evaluations:
            return
        say(trainer, f"\n{title}\n{evaluation_table(module.evaluations)}")
        if is_fast_dev_run(trainer) or not evaluation_counts(trainer):
            return
        folder = run_folder(trainer) / "evaluations" / evaluation_name(trainer)
        content = {set_name: evaluation.to_json() for set_name, evaluation in module.evaluations.items()}
        path = write_json(folder.with_name(folder.name + ".json"), content)
        mark_complete(folder)
        if trainer.state.fn != TrainerFn.FITTING:  # in training the run's loggers have the curves
            write_curves(folder, module.evaluations, "test" if trainer.testing else "val", module.iteration)
            say(trainer, f"results   {path}\nsamples   {folder}")


def write_curves(folder: Path, evaluations: Mapping[str, Evaluation], prefix: str, iteration: int) -> None:
    """Write the results for TensorBoard, with pass@j over j. (Readers of parquet folders skip the underscore.)"""
    from torch.utils.tensorboard import SummaryWriter  # slow to import, and modules import this package

    with SummaryWriter(str(folder / "_curves")) as writer:
        for name, evaluation in evaluations.items():
            for key, value in evaluation.scalars().items():
                writer.add_scalar(f"{prefix}/{name}/{key}", value, iteration)
            for j, estimate in evaluation.pass_at_k.items():
                writer.add_scalar(f"{prefix}/{name}/pass@j", estimate.mean, j)


def evaluation_table(evaluations: Mapping[str, Evaluation]) -> str:
    """One line per evaluation set; percentages with 95 % intervals. "read" is the share of responses in which the
    verifier found an answer, "cut" the share of responses truncated at the length limit."""
    header: tuple[str, ...] = ("set", "questions", "avg@k", "pass@k", "maj@k", "k", "length", "cut", "read")
    rows: list[tuple[str, ...]] = [
        (
            name,
            str(e.questions),
            _percent(e.avg_at_k),
            _percent(e.pass_at_k[e.samples]),
            _percent(e.maj_at_k) if e.maj_at_k else "-",
            str(e.samples),
            f"{e.mean_length:.1f}",
            f"{100 * e.truncated:.1f} %",
            "-" if e.extracted is None else f"{100 * e.extracted:.1f} %",
        )
        for name, e in evaluations.items()
    ]
    if all(e.extracted is None for e in evaluations.values()):  # no verifier reports extracted answers
        header, rows = _without(header, 4, 8), [_without(row, 4, 8) for row in rows]
    widths = [max(len(row[column]) for row in (header, *rows)) for column in range(len(header))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in (header, *rows)]
    lines.insert(1, "  ".join("-" * width for width in widths))
    if stopped := sum(e.timed_out for e in evaluations.values()):
        lines.append(f"{stopped} verifications were stopped (data.reward_pool) and count with its timeout_score")
    return "\n".join(line.rstrip() for line in lines)


def _without(cells: tuple[str, ...], *columns: int) -> tuple[str, ...]:
    return tuple(cell for column, cell in enumerate(cells) if column not in columns)


def _percent(estimate: Estimate) -> str:
    return f"{100 * estimate.mean:.1f} % [{100 * estimate.low:.1f}, {100 * estimate.high:.1f}]"
