"""Every response ever sampled, in parquet: the record that lets one ask questions after the run."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_only

from ibro_lightning.callbacks.say import say
from ibro_lightning.errors import ConfigError
from ibro_lightning.ranks import Ranks
from ibro_lightning.records import write_parquet
from ibro_lightning.run_folders import run_folder
from ibro_lightning.types import Rollout


class RolloutLog(pl.Callback):
    """Writes ``rollouts/iteration_000012.parquet`` in training and ``predictions/SET/batch_0000.parquet`` in predict.
    With several ranks, each writes its own share: ``iteration_000012_rank_3.parquet``.

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

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if isinstance(batch, Rollout) and self.every_n_iterations and batch.iteration % self.every_n_iterations == 0:
            folder = run_folder(trainer) / "rollouts"
            _write(folder / f"iteration_{batch.iteration:06d}.parquet", batch, Ranks.of(trainer.strategy))

    @rank_zero_only
    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        shutil.rmtree(run_folder(trainer) / "predictions", ignore_errors=True)  # batches of an earlier call

    def on_predict_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        folder = run_folder(trainer) / "predictions" / batch.name
        _write(folder / f"batch_{batch_idx:04d}.parquet", batch, Ranks.of(trainer.strategy))

    def on_predict_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        say(trainer, f"responses  {run_folder(trainer) / 'predictions'}")


def _write(path: Path, rollout: Rollout, ranks: Ranks) -> None:
    if ranks.size > 1:
        path = path.with_name(f"{path.stem}_rank_{ranks.rank}{path.suffix}")
    responses = len(rollout.dropped) if rollout.stands_in else len(rollout) + len(rollout.dropped)
    if ranks.leads and responses:
        write_parquet(path, rollout)
