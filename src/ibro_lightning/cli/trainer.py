"""The Trainer of a recipe: default flags, loggers and callbacks, and the flags that are refused."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Checkpoint, ProgressBar
from lightning.pytorch.loggers import Logger, TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_info

from ibro_lightning.callbacks import (
    Alarms,
    InformationPlane,
    MetricsLog,
    RolloutLog,
    SamplesTable,
    TensorBoardOverview,
)
from ibro_lightning.guards.trainer_flags import as_refusal, refuse_trainer
from ibro_lightning.runs.checkpoints.plugin import CheckpointFiles
from ibro_lightning.runs.folder import refuse_loggers
from ibro_lightning.runs.loggers import holds_a_run

DEFAULTS = {
    # "auto" would choose Apple's GPUs, which lack the float64 that sampling and advantages need.
    "accelerator": "cuda" if torch.cuda.is_available() else "cpu",
    "devices": 1,
    "num_sanity_val_steps": -1,  # the whole evaluation before training: "accuracy before"
    "log_every_n_steps": 1,
    "enable_model_summary": False,
    "inference_mode": False,  # in which FSDP2 cannot gather weights
}
BAREBONES = ("num_sanity_val_steps", "log_every_n_steps")
"""Flags of :data:`DEFAULTS` that ``barebones`` refuses."""
SHOWING = (MetricsLog, Alarms, InformationPlane, RolloutLog, SamplesTable, TensorBoardOverview)
"""Callbacks that a barebones Trainer does without."""


def loggers_for(command: str, settings: Any, root: str) -> list[Logger] | Literal[False]:
    """The loggers of a command. Only training has curves by default; other commands must not add to an earlier
    run's."""
    if settings.logger is False or (settings.barebones and settings.logger is None):
        return False
    if settings.logger in (None, True):
        curves = TensorBoardLogger(root, name="", version="", default_hp_metric=False)
        return [curves] if command == "fit" else False
    loggers: list[Logger] = settings.logger if isinstance(settings.logger, list) else [settings.logger]
    if command == "fit":
        return loggers
    for logger in filter(holds_a_run, loggers):
        rank_zero_info(f"{type(logger).__name__} is left out of {command}: {logger.log_dir} already has curves")
    return [logger for logger in loggers if not holds_a_run(logger)]


def build_trainer(
    build: Callable[[dict[str, Any], list[pl.Callback]], pl.Trainer],
    flags: dict[str, Any],
    callbacks: list[pl.Callback],
) -> pl.Trainer:
    """Build the Trainer, with ``build(flags, callbacks)``, without those of our callbacks that a flag switches off.
    Raises :class:`ConfigError` if Lightning refuses a flag, or the flag cannot take effect here."""
    user_flags = SimpleNamespace(**flags)
    if flags.get("barebones"):  # our own defaults are not the user's choice
        flags |= {flag: None for flag in BAREBONES if flags[flag] == DEFAULTS[flag]}
    has_bar = any(isinstance(callback, ProgressBar) for callback in _list(flags["callbacks"]))
    barebones = bool(flags.get("barebones"))
    off: dict[type[pl.Callback], bool] = {
        ProgressBar: barebones or has_bar or flags.get("enable_progress_bar") is False,
        Checkpoint: barebones or flags.get("enable_checkpointing") is False,
        **dict.fromkeys(SHOWING, barebones),
    }
    for callback in callbacks:
        if isinstance(callback, MetricsLog) and callback.every_n_iterations is None:
            # An explicit 50, which is Lightning's default, counts as well.
            callback.every_n_iterations = flags["log_every_n_steps"]
    flags["plugins"] = [*_list(flags.get("plugins")), CheckpointFiles()]
    kinds_off = tuple(kind for kind, is_off in off.items() if is_off)
    try:
        trainer = build(flags, [callback for callback in callbacks if not isinstance(callback, kinds_off)])
    except (MisconfigurationException, ValueError, TypeError, ModuleNotFoundError) as error:
        raise as_refusal(error, user_flags) from error
    refuse_trainer(trainer)
    refuse_loggers(trainer)
    return trainer


@contextmanager
def flags_refused(settings: Any) -> Iterator[None]:
    """Turn the errors that Lightning raises about flags once it has data and metrics into a :class:`ConfigError`."""
    try:
        yield
    except (MisconfigurationException, RuntimeError) as error:
        if not isinstance(error, MisconfigurationException) and "Early stopping conditioned" not in str(error):
            raise
        raise as_refusal(error, settings) from error


def _list(value: Any) -> list[Any]:
    """A setting that is one object, several or none, as a list."""
    return value if isinstance(value, list) else [] if value is None else [value]
