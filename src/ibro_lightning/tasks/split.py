"""The held-out split: a function of the problem alone, hence the same in all runs and files."""

from __future__ import annotations

import hashlib
from typing import Literal

from ibro_lightning.errors import ConfigError, is_number
from ibro_lightning.types import check_choice

Split = Literal["train", "heldout", "all"]


def check_split(split: Split, heldout_fraction: float) -> None:
    """Raise :class:`ConfigError` for another name of a split, or a fraction that is no share."""
    check_choice("split", split, Split)
    if not (is_number(heldout_fraction) and 0 <= heldout_fraction <= 1):
        raise ConfigError("heldout_fraction", heldout_fraction, "write a share from 0 to 1, such as 0.15")


def in_split(problem: str, split: Split, heldout_fraction: float) -> bool:
    """Whether ``problem`` (its canonical text) belongs to ``split``: it is held out if its SHA-256, read as a number
    in [0, 1), is below ``heldout_fraction``."""
    if split == "all":
        return True
    draw = int.from_bytes(hashlib.sha256(problem.encode()).digest()[:8], "big") / 2**64
    return (draw < heldout_fraction) == (split == "heldout")
