"""Printing beside a progress bar."""

from __future__ import annotations

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_only


@rank_zero_only
def say(trainer: pl.Trainer, text: str) -> None:
    """Print without disturbing the progress bar."""
    bar = trainer.progress_bar_callback
    (bar.print if bar is not None else print)(text)
