"""The trained policy as a Hugging Face folder."""

from __future__ import annotations

import lightning.pytorch as pl

from ibro_lightning.modules import PolicyModule
from ibro_lightning.run_folders import run_folder


class ExportModel(pl.Callback):
    """Writes ``model/`` (``config.json``, ``model.safetensors``, tokenizer) at the end of training.

    Args:
        enabled: False writes nothing; checkpoints are kept either way.
    """

    def __init__(self, enabled: bool = True) -> None:
        self.enabled = enabled
        self._done = False

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._done = False

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """All ranks: sharded weights are gathered."""
        if self.enabled and isinstance(pl_module, PolicyModule):
            pl_module.export(run_folder(trainer) / "model")
            self._done = True

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """A run that was killed after its last iteration has nothing left to train, but this may be missing."""
        if not self._done and trainer.fit_loop.epoch_loop.total_batch_idx >= 0:
            self.on_train_end(trainer, pl_module)
