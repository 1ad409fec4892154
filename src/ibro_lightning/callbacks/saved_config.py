"""Saves a run's resolved settings in its folder."""

from __future__ import annotations

import sys

import lightning
import lightning.pytorch as pl
import torch
import transformers
from lightning.pytorch.cli import SaveConfigCallback
from lightning.pytorch.trainer.states import TrainerFn

from ibro_lightning import __version__
from ibro_lightning.guards.disk import written_atomically
from ibro_lightning.runs.folder import run_folder
from ibro_lightning.runs.marks import HEADER
from ibro_lightning.runs.settings import set_settings_aside


class SaveResolvedConfig(SaveConfigCallback):
    """Saves every setting with its resolved value, under a header with the versions.

    Training writes ``config.yaml``; the other commands write ``validate.yaml`` and so on beside it.
    """

    def save_config(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        name = "config.yaml" if stage == "fit" else f"{TrainerFn(stage).value}.yaml"
        path = run_folder(trainer) / name
        with written_atomically(path) as partial:
            # Parsed, it is valid: checking every class in it again takes longer than writing it.
            self.parser.save(
                self.config,
                partial,
                skip_none=False,
                skip_validation=True,
                overwrite=True,
                multifile=self.multifile,
            )
            partial.write_text(header() + partial.read_text())
            if stage != "fit":
                set_settings_aside(path, partial)


def header() -> str:
    """Two comment lines: the versions of this package and the libraries, and the command."""
    versions = f"torch {torch.__version__}, lightning {lightning.__version__}, transformers {transformers.__version__}"
    return f"{HEADER} {__version__}, {versions}\n# python -m ibro_lightning {' '.join(sys.argv[1:])}\n"
