"""Checkpoints at iteration boundaries."""

from __future__ import annotations

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ModelCheckpoint


class IterationCheckpoint(ModelCheckpoint):
    """Lightning's ``ModelCheckpoint``, which would skip iterations that leave ``global_step`` as it is: those in which
    only PPO's critic learns."""

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._last_global_step_saved = -1
        super().on_train_epoch_end(trainer, pl_module)
