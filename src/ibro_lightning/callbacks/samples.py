"""A look at what the policy writes, in TensorBoard."""

from __future__ import annotations

import re
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only

from ibro_lightning.errors import ConfigError
from ibro_lightning.types import Rollout


class SamplesTable(pl.Callback):
    """A table of responses with their rewards, as TensorBoard text.

    Args:
        every_n_iterations: how often; 0 switches it off.
        rows: responses per table, from as many different prompts as there are.
        max_characters: longer prompts and responses are shortened in the table (never in the parquet log).
    """

    def __init__(self, every_n_iterations: int = 10, rows: int = 8, max_characters: int = 500) -> None:
        for name, value in (
            ("every_n_iterations", every_n_iterations),
            ("rows", rows),
            ("max_characters", max_characters),
        ):
            if value < 0:
                raise ConfigError(f"samples.{name}", value, "write 0 or more")
        self.every_n_iterations, self.rows, self.max_characters = every_n_iterations, rows, max_characters

    @rank_zero_only
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not isinstance(batch, Rollout) or not self.every_n_iterations or batch.iteration % self.every_n_iterations:
            return
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                table = samples_table(batch, self.rows, self.max_characters)
                logger.experiment.add_text("samples", table, global_step=batch.iteration)


def samples_table(rollout: Rollout, rows: int, max_characters: int) -> str:
    """A Markdown table of the first response of each group, then the second ones, …"""
    parts = list(rollout.reward_parts)
    lines = ["| prompt | response | tokens | reward | " + " | ".join(parts) + " |", "|" + "---|" * (4 + len(parts))]
    group_size = max(1, len(rollout) // max(1, len(rollout.groups.unique())))
    for row in sorted(range(len(rollout)), key=lambda i: (i % group_size, i))[:rows]:
        completion = rollout.completions[row]
        cells = [
            _cell(rollout.prompts[row].text, max_characters),
            _cell(completion.text, max_characters),
            f"{len(completion.token_ids)}{' (cut)' if completion.truncated else ''}",
            f"{rollout.rewards[row].item():.3g}",
            *(f"{rollout.reward_parts[name][row].item():.3g}" for name in parts),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(text: str, limit: int) -> str:
    """Text that Markdown shows as it is: nothing in it can close the cell or start markup."""
    text = text if len(text) <= limit else text[:limit] + " …"
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;").replace("\n", "<br>")
    return re.sub(r"([\\`*_|\[\]#~])", r"\\\1", text)
