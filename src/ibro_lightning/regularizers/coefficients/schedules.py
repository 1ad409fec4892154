"""Coefficients that change with the iteration alone."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from itertools import pairwise

from ibro_lightning.errors import ConfigError, check_at_least, check_count
from ibro_lightning.regularizers.coefficients.base import Coefficient


class Schedule(Coefficient):
    """From one value in the first iteration to another, then constant.

    Args:
        start: first value.
        end: last value.
        iterations: from the first value to the last.
    """

    follows_measurement = False

    def __init__(self, start: float, end: float, iterations: int) -> None:
        super().__init__()
        check_at_least("start", start, 0)
        check_at_least("end", end, 0)
        check_count("iterations", iterations, 1)
        self.start, self.end, self.iterations = start, end, iterations

    @property
    def progress(self) -> float:
        """0 in the first iteration, 1 after ``iterations``."""
        return min(1.0, max(0.0, self.state["iterations"] - 1) / self.iterations)

    @property
    def bounds(self) -> tuple[float, float]:
        return min(self.start, self.end), max(self.start, self.end)


class Linear(Schedule):
    """A straight line from ``start`` to ``end``."""

    @property
    def value(self) -> float:
        return self.start + (self.end - self.start) * self.progress


class Cosine(Schedule):
    """Half a cosine from ``start`` to ``end``: flat at both."""

    @property
    def value(self) -> float:
        return self.end + (self.start - self.end) * 0.5 * (1.0 + math.cos(math.pi * self.progress))


class Stages(Coefficient):
    """One value after another, each from a given iteration on.

    Args:
        values: of the stages.
        starts: the first iteration (from 1) of each stage but the first, in order: one less than ``values``.
    """

    follows_measurement = False

    def __init__(self, values: list[float], starts: list[int]) -> None:
        super().__init__()
        if isinstance(values, str) or not isinstance(values, Sequence) or not values:
            raise ConfigError("values", values, "write a list of numbers, such as [1.0, 0.5]")
        for value in values:
            check_at_least("values", value, 0)
        if isinstance(starts, str) or not isinstance(starts, Sequence) or len(starts) != len(values) - 1:
            raise ConfigError("starts", starts, f"write the first iterations of stages 2 to {len(values)} as a list")
        for start in starts:
            check_count("starts", start, 2)
        if any(later <= earlier for earlier, later in pairwise(starts)):
            raise ConfigError("starts", starts, "write iterations that increase, such as [100, 200]")
        self.values, self.starts = list(values), list(starts)

    @property
    def value(self) -> float:
        return self.values[bisect_right(self.starts, self.state["iterations"])]

    @property
    def bounds(self) -> tuple[float, float]:
        return min(self.values), max(self.values)
