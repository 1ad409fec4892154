"""Sampled responses in the loggers, beside the curves."""

from __future__ import annotations

import re
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only, rank_zero_warn

from ibro_lightning.batches import Rollout
from ibro_lightning.callbacks.needs import is_rollout
from ibro_lightning.errors import check_count
from ibro_lightning.runs.folder import run_folder
from ibro_lightning.runs.loggers import Table, log_table


class SamplesTable(pl.Callback):
    """Logs a table of responses with their rewards: as Markdown in TensorBoard and Comet, as an artifact in MLflow, as
    a table in W&B and loggers with its ``log_text``. Other loggers get none, which is reported in one line.

    Args:
        every_n_iterations: how often; 0 switches it off.
        rows: responses per table, from as many different prompts as possible.
        max_characters: longer prompts and responses are shortened in the table (never in the parquet log).
    """

    def __init__(self, every_n_iterations: int = 10, rows: int = 8, max_characters: int = 500) -> None:
        for name, value in (
            ("every_n_iterations", every_n_iterations),
            ("rows", rows),
            ("max_characters", max_characters),
        ):
            check_count(name, value, 0)
        self.every_n_iterations, self.rows, self.max_characters = every_n_iterations, rows, max_characters
        self._without, self._warned = set[str](), set[type]()

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage == TrainerFn.FITTING and self.every_n_iterations and not trainer.loggers and not trainer.barebones:
            rank_zero_warn("SamplesTable does nothing: it needs a logger, and the Trainer has none")

    @rank_zero_only
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not self.every_n_iterations or not is_rollout(batch, self, self._warned):
            return
        if batch.iteration % self.every_n_iterations:
            return
        without = log_table(
            trainer.loggers, "samples", lambda: _table(batch, self.rows, self.max_characters), batch.iteration
        )
        for name in sorted(set(without) - self._without):
            rank_zero_info(f"{name} does not log tables: samples are only in {run_folder(trainer) / 'rollouts'}")
        self._without.update(without)


def _table(rollout: Rollout, rows: int, max_characters: int) -> Table:
    """The first response of each group, then the second of each, and so on, as plain text and as Markdown; beside it
    the gold and, if the verifier reports them, the answer that it read and its reason."""
    verdicts = [name for name in ("answer", "why") if any(getattr(r, name) is not None for r in rollout.results)]
    columns = ["prompt", "response", "gold", *verdicts, "tokens", "reward", *rollout.reward_parts]
    group_size = max(1, len(rollout) // max(1, len(rollout.groups.unique())))
    cells = []
    for row in sorted(range(len(rollout)), key=lambda i: (i % group_size, i))[:rows]:
        completion = rollout.completions[row]
        numbers = [rollout.rewards[row], *(values[row] for values in rollout.reward_parts.values())]
        cells.append(
            [
                _shortened(rollout.prompts[row].text, max_characters),
                _shortened(completion.text, max_characters),
                _shortened(_gold(rollout.prompts[row].answer), max_characters),
                *(_shortened(str(getattr(rollout.results[row], name) or ""), max_characters) for name in verdicts),
                f"{len(completion.token_ids)}{' (cut)' if completion.truncated else ''}",
                *(f"{number.item():.3g}" for number in numbers),
            ]
        )
    return Table(columns, cells, _markdown(columns, cells))


def _gold(answer: Any) -> str:
    return "" if answer is None else str(answer)


def _markdown(columns: list[str], rows: list[list[str]]) -> str:
    lines = [" | ".join(columns), *(" | ".join(map(_cell, row)) for row in rows)]
    lines = [f"| {line} |" for line in lines]
    return "\n".join([lines[0], "|" + "---|" * len(columns), *lines[1:]])


def _shortened(text: str, limit: int) -> str:
    return text if len(text) <= limit else text[:limit] + " …"


def _cell(text: str) -> str:
    """Text escaped for Markdown, so that it can neither close the cell nor start markup."""
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;").replace("\n", "<br>")
    return re.sub(r"([\\`*_|\[\]#~])", r"\\\1", text)
