"""Exports the trained policy as a Hugging Face folder."""

from __future__ import annotations

from pathlib import Path

import lightning.pytorch as pl
from lightning.pytorch.trainer.states import TrainerFn

from ibro_lightning.callbacks.needs import ExportedModule, warn_unless
from ibro_lightning.errors import ConfigError
from ibro_lightning.runs.folder import claim_for, is_fast_dev_run, run_folder


class ExportModel(pl.Callback):
    """Writes ``model/`` (``config.json``, ``model.safetensors``, tokenizer) at the end of training.

    Args:
        enabled: False writes nothing; checkpoints are kept either way.
    """

    def __init__(self, enabled: bool = True) -> None:
        self.enabled = enabled
        self.written: Path | None = None
        """The folder of the exported model."""
        self._done = False

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Refuse to overwrite the policy that the run starts from, or anything that is not the run's."""
        if stage != TrainerFn.FITTING or not self.enabled:
            return
        warn_unless(self, pl_module, ExportedModule, "export, export_names and source_folders")
        if not isinstance(pl_module, ExportedModule):
            return
        folder = run_folder(trainer) / "model"
        if folder.resolve() in pl_module.source_folders and not is_fast_dev_run(trainer):
            remedy = "its model/ is the policy that this run starts from: write another folder for the run"
            raise ConfigError("trainer.default_root_dir", str(run_folder(trainer)), remedy)
        claim_for(trainer, *(path.name for path in pl_module.export_names(folder)))

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._done = False

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Export, on all ranks, as sharded weights are gathered."""
        if self.enabled and not is_fast_dev_run(trainer) and isinstance(pl_module, ExportedModule):
            self.written = pl_module.export(run_folder(trainer) / "model", keep_earlier=False)
            self._done = True

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Export after a resume with nothing left to train: the run may have been killed before the export."""
        if not self._done and trainer.fit_loop.epoch_loop.total_batch_idx >= 0:
            self.on_train_end(trainer, pl_module)
