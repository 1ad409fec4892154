"""The table at the end of an evaluation, for people and as JSON."""

from __future__ import annotations

from collections.abc import Mapping

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_only

from ibro_lightning.callbacks.run_folder import run_folder, say, write_json
from ibro_lightning.metrics import Estimate, Evaluation
from ibro_lightning.modules import PolicyModule


class EvaluationReport(pl.Callback):
    """Prints avg@k and pass@k with 95 % bootstrap intervals and writes them to ``evaluations/*.json``."""

    @rank_zero_only
    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not isinstance(pl_module, PolicyModule):
            return
        iteration = pl_module.iteration
        if trainer.sanity_checking:
            self._report(trainer, pl_module, "iteration_000000", "evaluation before training")
        elif iteration:
            self._report(trainer, pl_module, f"iteration_{iteration:06d}", f"evaluation after {iteration} iterations")
        else:
            self._report(trainer, pl_module, "validate", "evaluation")

    @rank_zero_only
    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if isinstance(pl_module, PolicyModule):
            self._report(trainer, pl_module, "test", "test")

    def _report(self, trainer: pl.Trainer, module: PolicyModule, name: str, title: str) -> None:
        if module.evaluations:
            say(trainer, f"\n{title}\n{evaluation_table(module.evaluations)}")
            content = {set_name: evaluation.to_json() for set_name, evaluation in module.evaluations.items()}
            write_json(run_folder(trainer) / "evaluations" / f"{name}.json", content)


def evaluation_table(evaluations: Mapping[str, Evaluation]) -> str:
    """One line per evaluation set; percentages with their 95 % intervals."""
    header = ("set", "questions", "avg@k", "pass@k", "k", "length", "cut")
    rows = [
        (
            name,
            str(e.questions),
            _percent(e.avg_at_k),
            _percent(e.pass_at_k[e.samples]),
            str(e.samples),
            f"{e.mean_length:.1f}",
            f"{100 * e.truncated:.1f} %",
        )
        for name, e in evaluations.items()
    ]
    widths = [max(len(row[column]) for row in (header, *rows)) for column in range(len(header))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in (header, *rows)]
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(line.rstrip() for line in lines)


def _percent(estimate: Estimate) -> str:
    return f"{100 * estimate.mean:.1f} % [{100 * estimate.low:.1f}, {100 * estimate.high:.1f}]"
