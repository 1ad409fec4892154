"""Every response ever sampled, in parquet: the record that lets one ask questions after the run."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pyarrow as pa
import pyarrow.parquet as pq
from lightning.pytorch.utilities import rank_zero_only

from ibro_lightning.callbacks.run_folder import run_folder
from ibro_lightning.errors import ConfigError
from ibro_lightning.types import Rollout


class RolloutLog(pl.Callback):
    """Writes ``rollouts/iteration_000012.parquet`` in training and ``predictions/SET/batch_0000.parquet`` in predict.

    A file per rollout, written whole or not at all, survives a killed run; ``pandas.read_parquet("rollouts")`` reads
    the folder as one table.

    Args:
        every_n_iterations: 1 keeps every rollout, 0 none.
    """

    def __init__(self, every_n_iterations: int = 1) -> None:
        if every_n_iterations < 0:
            raise ConfigError(
                "rollout_log.every_n_iterations", every_n_iterations, "write 1 (every rollout), more, or 0 (none)"
            )
        self.every_n_iterations = every_n_iterations

    @rank_zero_only
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if isinstance(batch, Rollout) and self.every_n_iterations and batch.iteration % self.every_n_iterations == 0:
            write_parquet(run_folder(trainer) / "rollouts" / f"iteration_{batch.iteration:06d}.parquet", batch)

    @rank_zero_only
    def on_predict_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        write_parquet(run_folder(trainer) / "predictions" / batch.name / f"batch_{batch_idx:04d}.parquet", batch)


def write_parquet(path: Path, rollout: Rollout) -> Path:
    """One row per response: prompt, response text, token counts, reward and its parts, iteration."""
    path.parent.mkdir(parents=True, exist_ok=True)
    columns: dict[str, Any] = {
        "iteration": [rollout.iteration] * len(rollout),
        "group": rollout.groups.tolist(),
        "prompt_id": [prompt.id for prompt in rollout.prompts],
        "prompt": [prompt.text for prompt in rollout.prompts],
        "response": [completion.text for completion in rollout.completions],
        "prompt_tokens": rollout.sequences.prompt_lengths.tolist(),
        "response_tokens": rollout.sequences.response_lengths.tolist(),
        "finish_reason": [completion.finish_reason for completion in rollout.completions],
        "seed": [completion.seed for completion in rollout.completions],
        "reward": rollout.rewards.tolist(),
        **{f"reward_{name}": values.tolist() for name, values in rollout.reward_parts.items()},
        "mean_logp": [sum(c.logp) / max(1, len(c.logp)) for c in rollout.completions],
    }
    partial = path.with_name(path.name + ".partial")
    pq.write_table(pa.table(columns), partial)
    os.replace(partial, path)
    return path
