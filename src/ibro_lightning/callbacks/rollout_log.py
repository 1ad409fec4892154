"""Records every sampled response in parquet files, for analysis after the run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only

from ibro_lightning import __version__
from ibro_lightning.batches import Rollout
from ibro_lightning.callbacks.needs import is_rollout
from ibro_lightning.callbacks.say import say
from ibro_lightning.errors import check_count
from ibro_lightning.guards.disk import free_name, write_json
from ibro_lightning.ranks import Ranks
from ibro_lightning.runs.authorship import leave_to_others, own_in, run_id, set_aside
from ibro_lightning.runs.folder import claim_for, clear_way, is_fast_dev_run, run_folder
from ibro_lightning.runs.holding import RunLock
from ibro_lightning.runs.model_folders import prune, remove
from ibro_lightning.runs.parquet import write_parquet
from ibro_lightning.runs.samples_manifest import MANIFEST, read_manifest


class RolloutLog(pl.Callback):
    """Writes ``rollouts/iteration_000012.parquet`` in training and ``predictions/SET/batch_0000.parquet`` in predict.
    With several ranks, each writes its own share: ``iteration_000012_rank_3.parquet``.

    There is one file per rollout, written atomically, so a killed run leaves no half files;
    ``pandas.read_parquet("rollouts")`` reads the folder as one table.

    Args:
        every_n_iterations: 1 keeps every rollout, 0 none.
    """

    def __init__(self, every_n_iterations: int = 1) -> None:
        check_count("every_n_iterations", every_n_iterations, 0, " (1: every rollout, 0: none)")
        self.every_n_iterations = every_n_iterations
        self._warned = set[type]()

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage in (TrainerFn.FITTING, TrainerFn.PREDICTING):
            RunLock.of(trainer).take(trainer)
            claim_for(trainer, "rollouts" if stage == TrainerFn.FITTING else "predictions")

    def on_sanity_check_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        clear_way(trainer)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        clear_way(trainer)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if is_fast_dev_run(trainer):
            return
        if (
            self.every_n_iterations
            and is_rollout(batch, self, self._warned)
            and batch.iteration % self.every_n_iterations == 0
        ):
            folder = run_folder(trainer) / "rollouts"
            path, ranks = folder / f"iteration_{batch.iteration:06d}.parquet", Ranks.of(trainer.strategy)
            _write(path, batch, ranks, run_id(run_folder(trainer)))

    @rank_zero_only
    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not is_fast_dev_run(trainer):
            set_predictions_aside(run_folder(trainer) / "predictions")

    def on_predict_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if is_fast_dev_run(trainer) or not is_rollout(batch, self, self._warned):
            return
        folder = run_folder(trainer) / "predictions" / batch.name
        _write(folder / f"batch_{batch_idx:04d}.parquet", batch, Ranks.of(trainer.strategy))

    def on_predict_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if is_fast_dev_run(trainer):
            return
        if trainer.is_global_zero and (run_folder(trainer) / "predictions").is_dir():
            write_json(run_folder(trainer) / "predictions" / MANIFEST, {"version": __version__, "complete": True})
        say(trainer, f"responses  {run_folder(trainer) / 'predictions'}")


def set_predictions_aside(folder: Path) -> None:
    """Move the batches of an earlier call to ``predictions.1``; remove those of a killed one."""
    own = own_in(folder, folder.name)
    if read_manifest(folder) is None:
        ours = leave_to_others(folder.parent, [f"{folder.name}/{name}" for name in own])
        remove(folder.parent, ours)
        prune(folder)
    else:
        aside = free_name(folder)
        set_aside(folder, aside, own)
        rank_zero_info(f"earlier predictions were in {folder}: moved to {aside}")


def _write(path: Path, rollout: Rollout, ranks: Ranks, run: str = "") -> None:
    if ranks.size > 1:
        path = path.with_name(f"{path.stem}_rank_{ranks.rank}{path.suffix}")
    responses = len(rollout.dropped) if rollout.placeholder else len(rollout) + len(rollout.dropped)
    if ranks.leads and responses:
        write_parquet(path, rollout, run=run)
