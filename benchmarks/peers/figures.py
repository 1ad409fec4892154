"""From reports to ratios: medians, quartiles, whether both sides did the same work, and whether they learned."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from peers.work import Iteration, Report

STANDARD_ERRORS = 4.0
"""How far apart means of the same distribution may lie; chance exceeds it once in 16,000 comparisons."""


@dataclass(frozen=True)
class Spread:
    """A median with its quartiles."""

    low: float
    median: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        if len(values) == 1:
            return cls(values[0], values[0], values[0])
        return cls(*statistics.quantiles(values, n=4, method="inclusive"))

    def text(self, digits: int = 3) -> str:
        return f"{self.median:.{digits}f} ({self.low:.{digits}f} - {self.high:.{digits}f})"


def median_cpu_s(report: Report) -> float:
    return statistics.median(one.cpu_s for one in report.warm)


def median_wall_s(report: Report) -> float:
    return statistics.median(one.wall_s for one in report.warm)


def ratios(numerators: Sequence[float], denominators: Sequence[float]) -> Spread:
    """Of the ratios within a turn, on which whatever else the machine did falls alike."""
    return Spread.of([a / b for a, b in zip(numerators, denominators, strict=True)])


def phase_seconds(reports: Sequence[Report]) -> dict[str, float]:
    """Median CPU seconds per iteration of each phase, in the order of an iteration."""
    warm = [one for report in reports for one in report.warm]
    names = list(dict.fromkeys(name for one in warm for name in one.phases))
    return {name: statistics.median(one.phases.get(name, 0.0) for one in warm) for name in names}


def tokens_of(phase: str, iteration: Iteration) -> float:
    """The tokens that a phase handles: with their prompts once they are trained on."""
    return iteration.trained if phase in ("prepare", "update") else iteration.generated


def tokens_per_second(reports: Sequence[Report], phase: str) -> float:
    """Tokens per CPU second of one phase, over all warm iterations."""
    warm = [one for report in reports for one in report.warm]
    seconds = sum(one.phases.get(phase, 0.0) for one in warm)
    return sum(tokens_of(phase, one) for one in warm) / seconds if seconds else float("inf")


def differences(one: Sequence[Report], other: Sequence[Report]) -> list[str]:
    """What two sides did differently, in words; empty if they did the same work.

    Counts and prompts must be equal in every iteration. Lengths and accuracies must agree in the first iteration, where
    both sides sample from the same weights: prompt by prompt, their mean difference lies within four standard errors.
    """
    found = []
    for turn, (a, b) in enumerate(zip(one, other, strict=True)):
        if len(a.iterations) != len(b.iterations):
            found.append(f"turn {turn + 1}: {len(a.iterations)} iterations and {len(b.iterations)}")
            continue
        for number, (x, y) in enumerate(zip(a.iterations, b.iterations, strict=True)):
            for name in ("prompts", "prompt_tokens", "completions", "optimizer_steps"):
                if (mine := getattr(x, name)) != (theirs := getattr(y, name)):
                    found.append(f"turn {turn + 1}, iteration {number + 1}: {name} {_brief(mine)} and {_brief(theirs)}")
    if found:
        return found
    for name in ("lengths", "accuracies"):
        pairs = [
            (p, q)
            for a, b in zip(one, other, strict=True)
            for p, q in zip(getattr(a.iterations[0], name), getattr(b.iterations[0], name), strict=True)
        ]
        apart = [p - q for p, q in pairs]
        error = statistics.stdev(apart) / len(apart) ** 0.5 if len(apart) > 1 else 0.0
        if abs(statistics.fmean(apart)) > STANDARD_ERRORS * error + 1e-9:
            means = [statistics.fmean(side) for side in zip(*pairs, strict=True)]
            found.append(
                f"{name} of the first iteration: {means[0]:.3f} and {means[1]:.3f} (standard error {error:.3f})"
            )
    return found


def _brief(value: object) -> str:
    return f"{str(value)[:40]}…" if len(str(value)) > 40 else str(value)


def gain(reports: Sequence[Report]) -> tuple[float, float, float]:
    """``(accuracy in the first quarter of the iterations, in the last, standard error of the difference)``."""
    early, late = list[float](), list[float]()
    for report in reports:
        accuracy = [statistics.fmean(one.accuracies) for one in report.iterations]
        quarter = max(1, len(accuracy) // 4)
        early, late = early + accuracy[:quarter], late + accuracy[-quarter:]
    error = sum(statistics.variance(part) / len(part) for part in (early, late) if len(part) > 1) ** 0.5
    return statistics.fmean(early), statistics.fmean(late), error


def learned(reports: Sequence[Report]) -> bool:
    """Whether accuracy rose by more than four standard errors."""
    early, late, error = gain(reports)
    return late - early > STANDARD_ERRORS * error
