"""Numbers in words: units, signs, intervals and p-values as the report writes them."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from ibro_lightning.studies.statistics import Interval

_SHARES = re.compile(r"(?:avg|pass|maj)@\d+|accuracy|coverage|majority|extracted|truncated|.*share")


@dataclass(frozen=True)
class Unit:
    """How a metric's values are written."""

    scale: float
    digits: int
    sign: str
    """After a value, such as `` %``."""
    of_difference: str
    """After a difference: percentages differ by points."""

    def value(self, value: float) -> str:
        """``81.4 %``; a dash for NaN."""
        return "–" if math.isnan(value) else f"{self._digits(value)}{self.sign}"

    def difference(self, value: float) -> str:
        """``+1.2 points``"""
        return "–" if math.isnan(value) else f"{self._digits(value, '+')}{self.of_difference}"

    def size(self, value: float) -> str:
        """``1.2 points``, for the size of a difference."""
        if math.isinf(value):
            return "no difference, however large"
        return "–" if math.isnan(value) else f"{self._digits(value)}{self.of_difference}"

    def range(self, interval: Interval, sign: str = "") -> str:
        """``[80.1, 82.7]``; a dash where there are too few seeds."""
        if math.isnan(interval.low):
            return "–"
        return f"[{self._digits(interval.low, sign)}, {self._digits(interval.high, sign)}]"

    def estimate(self, interval: Interval) -> str:
        """``81.4 % [80.1, 82.7]``"""
        return _joined(self.value(interval.estimate), self.range(interval))

    def estimate_of_difference(self, interval: Interval) -> str:
        """``+1.2 points [−0.1, +2.5]``"""
        return _joined(self.difference(interval.estimate), self.range(interval, "+"))

    def _digits(self, value: float, sign: str = "") -> str:
        text = f"{self.scale * value:{sign}.{self.digits}f}"
        zero = float(text) == 0
        return (text.replace("-", "") if zero else text).replace("-", "−")


def unit_of(metric: str) -> Unit:
    """The unit of a metric, by its name."""
    name = metric.rsplit("/", 1)[-1]
    if _SHARES.fullmatch(name):
        return Unit(100, 1, " %", " points")
    if "entropy" in name:
        return Unit(1, 4, " nats", " nats")
    if name.startswith("length"):
        return Unit(1, 1, " tokens", " tokens")
    return Unit(1, 4, "", "")


def title_of(metric: str) -> str:
    """What to call a metric in a heading or on an axis."""
    fixed = {
        "policy/entropy": "Entropy of the policy",
        "ib/mean_advantage_times_mean_entropy": "Ā·H̄, the uniform part of the IB objective",
        "ib/cov_advantage_entropy": "Cov(A, H), the part per token",
        "rollout/length_right": "Length of right responses",
        "rollout/length_wrong": "Length of wrong responses",
    }
    if metric in fixed:
        return fixed[metric]
    if match := re.fullmatch(r"(?:val|test)/(.+)/(avg|pass|maj)@(\d+)", metric):
        return f"{match[2]}@{match[3]} on {match[1]}"
    if match := re.fullmatch(r"(?:val|test)/(.+)/length", metric):
        return f"Length of responses on {match[1]}"
    if metric.endswith("gradient_share"):
        return "The regulariser's share of the gradient"
    return metric


def p_value(p: float) -> str:
    """Four decimals, as the smallest of a sign-flip test with many pairs is 0.0001."""
    if math.isnan(p):
        return "–"
    return "< 0.0001" if p < 0.0001 else f"{p:.4f}"


def number(value: float, digits: int = 2) -> str:
    """A plain number, a dash for NaN."""
    return "–" if math.isnan(value) else f"{value:.{digits}f}".replace("-", "−")


def listed(names: Sequence[object]) -> str:
    """``a, b and c``"""
    words = [str(name) for name in names]
    return " and ".join(filter(None, [", ".join(words[:-1]), *words[-1:]]))


def plural(count: int, noun: str) -> str:
    """``1 seed``, ``2 seeds``"""
    return f"{count} {noun}{'s' * (count != 1)}"


def _joined(estimate: str, interval: str) -> str:
    return estimate if interval == "–" else f"{estimate} {interval}"
