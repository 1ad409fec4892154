"""Printing while a progress bar is shown."""

from __future__ import annotations

from contextlib import suppress

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_only


@rank_zero_only
def say(trainer: pl.Trainer, text: str) -> None:
    """Print on the first rank, without disturbing the progress bar."""
    bar = trainer.progress_bar_callback
    with suppress(OSError, ValueError):  # a closed stream; the command line's SafeStream never raises
        (bar.print if bar is not None else print)(text)
