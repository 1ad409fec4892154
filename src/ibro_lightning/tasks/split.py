"""The held-out split: a function of the problem alone, hence the same in all runs and files."""

from __future__ import annotations

import hashlib
from typing import Literal

Split = Literal["train", "heldout", "all"]


def in_split(problem: str, split: Split, heldout_fraction: float) -> bool:
    """Whether ``problem`` (its canonical text) belongs to ``split``: it is held out if its SHA-256, read as a number
    in [0, 1), is below ``heldout_fraction``."""
    if split == "all":
        return True
    draw = int.from_bytes(hashlib.sha256(problem.encode()).digest()[:8], "big") / 2**64
    return (draw < heldout_fraction) == (split == "heldout")
