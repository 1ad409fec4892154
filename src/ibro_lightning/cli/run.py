"""``fit``, ``validate``, ``test`` and ``predict``: everything that Lightning's command line runs."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence

import lightning.pytorch as pl

from ibro_lightning import __version__
from ibro_lightning.callbacks.saved_config import SaveResolvedConfig
from ibro_lightning.cli.commands import PROGRAM
from ibro_lightning.cli.parser import OneLineParser, long_names
from ibro_lightning.cli.trainer import DEFAULTS
from ibro_lightning.cli.training import IbroCLI
from ibro_lightning.runs.recipes import resolve_configs

# Warnings on which a user cannot act.
NOISE = (
    ".*LeafSpec.*",
    ".*does not have many workers.*",
    ".*across ranks is zero.*",
    ".*sync_dist=True.*",  # vLLM opens a process group even for one process; torchmetrics reduces evaluations
)


def main(argv: Sequence[str]) -> None:
    """Run the command in ``argv[0]`` with the settings after it."""
    for message in NOISE:
        warnings.filterwarnings("ignore", message=message)
    # Lightning and the parser read sys.argv themselves (for relaunches and messages).
    sys.argv[1:] = long_names(resolve_configs(argv))
    IbroCLI(
        model_class=pl.LightningModule,
        datamodule_class=pl.LightningDataModule,
        subclass_mode_model=True,
        subclass_mode_data=True,
        save_config_callback=SaveResolvedConfig,
        save_config_kwargs={"save_to_log_dir": False},  # i.e. to a logger's folder
        trainer_defaults=DEFAULTS,
        seed_everything_default=0,
        parser_class=OneLineParser,
        parser_kwargs={"prog": PROGRAM, "parser_mode": "omegaconf", "version": __version__},
        auto_configure_optimizers=False,
        load_from_checkpoint_support=False,
    )
