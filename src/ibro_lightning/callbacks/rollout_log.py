"""Every response ever sampled, in parquet: the record that lets one ask questions after the run."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pyarrow as pa
import pyarrow.parquet as pq
from lightning.pytorch.utilities import rank_zero_only

from ibro_lightning.callbacks.run_folder import run_folder, say
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
    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        shutil.rmtree(run_folder(trainer) / "predictions", ignore_errors=True)  # batches of an earlier call

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

    def on_predict_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        say(trainer, f"responses  {run_folder(trainer) / 'predictions'}")


def write_parquet(path: Path, rollout: Rollout) -> Path:
    """One row per sampled response; ``trained_on`` is True for those in the update's batch."""
    path.parent.mkdir(parents=True, exist_ok=True)
    learnt = rollout.name == "train" and not rollout.skip_update
    kept = [
        (
            prompt,
            completion,
            reward,
            {name: values[row].item() for name, values in rollout.reward_parts.items()},
            learnt,
        )
        for row, (prompt, completion, reward) in enumerate(
            zip(rollout.prompts, rollout.completions, rollout.rewards.tolist(), strict=True)
        )
    ]
    dropped = [
        (group.prompt, completion, float(result.reward), dict(result.parts), False)
        for group in rollout.dropped
        for completion, result in zip(group.completions, group.results, strict=True)
    ]
    rows = [
        {
            "iteration": rollout.iteration,
            "prompt_id": prompt.id,
            "prompt": prompt.text,
            "answer": json.dumps(prompt.answer, default=str),
            "meta": json.dumps(dict(prompt.meta), default=str),
            "response": completion.text,
            "prompt_tokens": len(prompt.token_ids),
            "response_tokens": len(completion.token_ids),
            "finish_reason": completion.finish_reason,
            "seed": completion.seed,
            "reward": reward,
            **{f"reward_{name}": value for name, value in parts.items()},
            "mean_logp": sum(completion.logp) / max(1, len(completion.logp)),
            "trained_on": trained_on,
        }
        for prompt, completion, reward, parts, trained_on in (*kept, *dropped)
    ]
    partial = path.with_name(path.name + ".partial")
    names = dict.fromkeys(name for row in rows for name in row)
    pq.write_table(pa.table({name: [row.get(name) for row in rows] for name in names}), partial)
    os.replace(partial, path)
    return path
