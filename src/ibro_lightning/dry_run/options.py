"""The dry run's command-line options; everything else in this package is imported only for a dry run."""

from __future__ import annotations

import math
from dataclasses import dataclass

from lightning.pytorch.cli import LightningArgumentParser

from ibro_lightning.errors import ConfigError


@dataclass(frozen=True)
class EstimateOptions:
    """Assumptions of a dry run.

    Args:
        gib: memory of one device in GiB; None takes this machine's, if it has such devices.
        tflops: TFLOP/s that one device sustains on this work, as measured in another run; None gives no time, unless
            the run's folder holds the curves of an earlier run, whose speed is taken.
        response_tokens: mean length of a response, for the time; None takes that of an earlier run, or the longest
            that data.sampling allows. Memory is always for the longest.
    """

    gib: float | None = None
    tflops: float | None = None
    response_tokens: float | None = None

    def __post_init__(self) -> None:
        for name in ("gib", "tflops", "response_tokens"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value > 0):
                raise ConfigError(f"estimate.{name}", value, "write a positive number")


def add_arguments(parser: LightningArgumentParser) -> None:
    """Add ``--dry_run`` and ``--estimate.*``."""
    parser.add_argument(
        "--dry_run",
        action="store_true",
        help="Check data, rewards and templates on a few rows, print memory per rank and arithmetic, and exit.",
    )
    parser.add_class_arguments(EstimateOptions, "estimate")
