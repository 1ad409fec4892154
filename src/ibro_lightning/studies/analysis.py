"""What the report says of a study, in numbers: final values, comparisons, accuracy at matched entropy, questions."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ibro_lightning.studies.results import Matrix, Question, Results
from ibro_lightning.studies.statistics import (
    Interval,
    PairedDifference,
    holm,
    interquartile_interval,
    mean_interval,
    paired_difference,
)


@dataclass(frozen=True)
class ArmResult:
    """An arm's metric at the last iteration, over its finished seeds."""

    arm: str
    mean: Interval
    middle: Interval
    """The interquartile mean."""
    sd: float
    lowest: float
    highest: float
    iteration: int | None
    """Where it was read; None where no trial has finished."""


@dataclass(frozen=True)
class Comparison:
    """Two arms, paired by seed."""

    reference: str
    other: str
    paired: PairedDifference
    p_corrected: float
    """By Holm's method over all planned comparisons."""
    missing: tuple[int, ...] = ()
    """Seeds of the study that one of the two arms lacks."""


@dataclass(frozen=True)
class Matched:
    """The other arm's accuracy where its entropy equals the reference's at temperature 1, minus the reference's."""

    set: str
    reference: str
    other: str
    difference: PairedDifference
    entropy: float
    """The reference's, in nats per token, mean over its seeds."""
    outside: int
    """Seeds left out, as the entropy is outside what the other arm's temperatures span: nothing is extrapolated."""


@dataclass(frozen=True)
class Change:
    """How a question's accuracy differs between two arms, mean over the seeds that both have."""

    set: str
    question: str
    text: str
    answer: str
    before: float
    after: float
    seeds: int
    example_before: Question
    """The reference's sample on the seed that shows the change best."""
    example_after: Question

    @property
    def change(self) -> float:
        return self.after - self.before


def arm_results(results: Results, metric: str) -> list[ArmResult]:
    """Every arm's final values; arms without a finished trial have NaNs. ConfigError if no trial has the metric."""
    matrix, ends = results.last(metric), results.last_iterations(metric)
    level = 1 - results.study.plan.level
    rows = []
    for arm, values in zip(results.arms, matrix, strict=True):
        kept = values[np.isfinite(values)]
        rows.append(
            ArmResult(
                arm=arm,
                mean=mean_interval(kept, level),
                middle=interquartile_interval(kept, level),
                sd=float(kept.std(ddof=1)) if len(kept) > 1 else math.nan,
                lowest=float(kept.min()) if len(kept) else math.nan,
                highest=float(kept.max()) if len(kept) else math.nan,
                iteration=ends.get(arm),
            )
        )
    return rows


def comparisons(results: Results, metric: str = "") -> list[Comparison]:
    """The planned pairs of arms, compared at the last iteration, by default on the primary outcome. P-values are
    corrected over all of them; an arm without finished trials has NaNs."""
    plan = results.study.plan
    matrix = results.last(metric or plan.metric)
    found = []
    for reference, other in plan.comparisons:
        before, after = (matrix[results.arms.index(arm)] for arm in (reference, other))
        both = np.isfinite(before) & np.isfinite(after)
        missing = tuple(seed for seed, here in zip(results.seeds, both, strict=True) if not here)
        paired = paired_difference(before, after, level=plan.level, comparisons=len(plan.comparisons))
        found.append(Comparison(reference, other, paired, math.nan, missing))
    corrected = holm([comparison.paired.p_value for comparison in found])
    return [replace(comparison, p_corrected=p) for comparison, p in zip(found, corrected, strict=True)]


def temperature_metrics(results: Results) -> dict[str, dict[float, tuple[str, str]]]:
    """``{set: {temperature: (name of avg@k, name of entropy)}}`` of sets on which the final policies were evaluated
    at several temperatures."""
    found: dict[str, dict[float, tuple[str, str]]] = {}
    for name in results.metrics:
        if match := re.fullmatch(r"at_temperature/([\d.]+)/(.+)/avg@\d+", name):
            entropy = f"at_temperature/{match[1]}/{match[2]}/entropy"
            if entropy in results.metrics:
                found.setdefault(match[2], {})[float(match[1])] = (name, entropy)
    return {part: dict(sorted(of_set.items())) for part, of_set in found.items() if len(of_set) > 1}


def temperature_curves(results: Results, part: str) -> tuple[list[float], Matrix, Matrix]:
    """``(temperatures [T], accuracy [arms, seeds, T], entropy [arms, seeds, T])`` on one set."""
    names = temperature_metrics(results)[part]
    accuracy, entropy = (np.stack([results.last(pair[of]) for pair in names.values()], axis=-1) for of in (0, 1))
    return list(names), accuracy, entropy


def matched_entropy(results: Results) -> list[Matched]:
    """Compare the planned pairs at equal entropy, seed by seed: each arm's accuracy is interpolated linearly between
    its temperatures to the entropy that the reference has at temperature 1."""
    found = []
    for part in temperature_metrics(results):
        temperatures, accuracy, entropy = temperature_curves(results, part)
        if 1.0 not in temperatures:
            continue
        one = temperatures.index(1.0)
        pairs = results.study.plan.comparisons
        for reference, other in pairs:
            first, second = results.arms.index(reference), results.arms.index(other)
            target, before = entropy[first, :, one], accuracy[first, :, one]  # [seeds]
            after = np.array([at_entropy(*row) for row in zip(target, entropy[second], accuracy[second], strict=True)])
            both = np.isfinite(target) & np.isfinite(accuracy[second]).any(axis=1)
            level = results.study.plan.level
            difference = paired_difference(before, after, level=level, comparisons=len(pairs))
            mean = float(target[both].mean()) if both.any() else math.nan
            outside = int((both & ~np.isfinite(after)).sum())
            found.append(Matched(part, reference, other, difference, mean, outside))
    return found


def at_entropy(target: float, entropy: Matrix, accuracy: Matrix) -> float:
    """The accuracy at an entropy, interpolated linearly; NaN where ``target`` is outside.

    Args:
        entropy: ``[T]``, in nats, in any order.
        accuracy: ``[T]``.

    >>> at_entropy(0.25, np.array([0.1, 0.3]), np.array([0.9, 0.5]))
    0.6
    """
    given = np.isfinite(entropy) & np.isfinite(accuracy)
    if given.sum() < 2 or not entropy[given].min() <= target <= entropy[given].max():
        return math.nan
    order = np.argsort(entropy[given], kind="stable")
    return round(float(np.interp(target, entropy[given][order], accuracy[given][order])), 12)


def changed_questions(results: Results, reference: str, other: str, most: int = 5) -> tuple[list[Change], list[Change]]:
    """``(gained, lost)``: the questions on which two arms differ most, at most ``most`` each, the largest first."""
    by_arm: dict[str, dict[tuple[str, str], dict[int, Question]]] = {reference: {}, other: {}}
    for question in results.questions:
        if question.arm in by_arm and (question.arm, question.seed) in results.finished:
            by_arm[question.arm].setdefault((question.set, question.question), {})[question.seed] = question
    changes = []
    for name, before in by_arm[reference].items():
        after = by_arm[other].get(name, {})
        if seeds := sorted(before.keys() & after.keys()):
            changes.append(_change(before, after, seeds))
    changes.sort(key=lambda change: (-change.change, change.set, change.question))
    gained = [change for change in changes if change.change > 0][:most]
    return gained, [change for change in reversed(changes) if change.change < 0][:most]


def _change(before: dict[int, Question], after: dict[int, Question], seeds: list[int]) -> Change:
    first, second = (sum(of[seed].avg for seed in seeds) / len(seeds) for of in (before, after))
    sign = 1 if second >= first else -1

    def shows(seed: int) -> tuple[int, float]:
        """How well a seed's samples show the change: best where one is right and the other is wrong."""
        turned = sign * (after[seed].right - before[seed].right)
        return turned, sign * (after[seed].avg - before[seed].avg)

    seed = max(seeds, key=shows)
    asked = before[seed]
    return Change(
        set=asked.set,
        question=asked.question,
        text=asked.text,
        answer=asked.answer,
        before=first,
        after=second,
        seeds=len(seeds),
        example_before=asked,
        example_after=after[seed],
    )


def final_sets(results: Results) -> dict[str, str]:
    """``{set: name of its avg@k}`` of all evaluation sets."""
    found: dict[str, str] = {}
    for name in results.metrics:
        if match := re.fullmatch(r"(?:val|test)/(.+)/avg@\d+", name):
            found.setdefault(match[1], name)
    return found


def other_outcomes(results: Results) -> list[str]:
    """Metrics that the report shows at the end beside the primary one, those that the study has."""
    patterns = [
        *(r"val/(?!.*(?:sync|verifier)/).+/avg@\d+", r"val/.+/pass@\d+", r"val/.+/maj@\d+", r"val/.+/length"),
        *(r"policy/entropy", r"rollout/length_right", r"rollout/length_wrong", r".*gradient_share"),
        *("ib/mean_advantage_times_mean_entropy", "ib/cov_advantage_entropy"),
    ]
    names = [name for pattern in patterns for name in largest(results.metrics, pattern)]
    return [name for name in dict.fromkeys(names) if name != results.study.plan.metric]


def largest(names: Sequence[str], pattern: str) -> list[str]:
    """The names that match; of several that differ only in a number after ``@``, the one with the largest."""
    best: dict[str, tuple[int, str]] = {}
    for name in names:
        if re.fullmatch(pattern, name):
            stem, _, number = name.partition("@")
            best[stem] = max(best.get(stem, (-1, "")), (int(number or 0), name))
    return [name for _, name in best.values()]


def curve_intervals(values: Matrix, level: float) -> np.ndarray[Any, Any]:
    """``[3, I]``: mean over seeds with its t interval at every iteration, of one arm's ``[seeds, I]``."""
    rows = [mean_interval(values[:, column], level) for column in range(values.shape[1])]
    return np.array([[row.estimate, row.low, row.high] for row in rows]).T
