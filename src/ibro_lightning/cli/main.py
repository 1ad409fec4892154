"""Entry point of the command line: runs the command, and handles output and exit."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence

import lightning.pytorch as pl

from ibro_lightning.callbacks.saved_config import SaveResolvedConfig
from ibro_lightning.cli import export as exporting
from ibro_lightning.cli.commands import answer
from ibro_lightning.cli.parser import OneLineParser, long_names, resolve_configs
from ibro_lightning.cli.trainer import DEFAULTS
from ibro_lightning.cli.training import IbroCLI
from ibro_lightning.evaluation import compare
from ibro_lightning.guards import interruption, printing, signals
from ibro_lightning.guards.endings import ended
from ibro_lightning.version import __version__

# Warnings on which a user cannot act.
NOISE = (
    ".*LeafSpec.*",
    ".*does not have many workers.*",
    ".*across ranks is zero.*",
    ".*sync_dist=True.*",  # vLLM opens a process group even for one process; torchmetrics reduces evaluations
)


def main(args: Sequence[str] | None = None) -> None:
    """Entry point of ``python -m ibro_lightning``; ``args`` as on the command line.

    Raises:
        SystemExit: with the exit code of ``docs/endings.md``, unless that is 0.
    """
    argv = list(sys.argv[1:] if args is None else args)
    interruption.clear()
    with printing.protected(), ended(), signals.raised():
        signals.end_with_launcher()
        for message in NOISE:
            warnings.filterwarnings("ignore", message=message)
        if (text := answer(argv)) is not None:
            print(text)
            printing.check_delivered()
        elif argv[:1] == ["compare"]:
            compare.main(argv[1:])
            printing.check_delivered()
        elif argv[:1] == ["export"]:
            exporting.main(resolve_configs(argv[1:]))
            printing.check_delivered()
        else:
            # Lightning and the parser read sys.argv themselves (for relaunches and messages).
            sys.argv[1:] = long_names(resolve_configs(argv))
            _train_or_evaluate()


def _train_or_evaluate() -> None:
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
        parser_kwargs={"parser_mode": "omegaconf", "version": __version__},
        auto_configure_optimizers=False,
        load_from_checkpoint_support=False,
    )
