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

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.enabled and isinstance(pl_module, PolicyModule):
            pl_module.export(run_folder(trainer) / "model")
