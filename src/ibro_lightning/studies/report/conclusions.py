"""What the numbers show, and what they do not, in sentences that are made from them."""

from __future__ import annotations

import math

from ibro_lightning.studies.analysis import Comparison, Matched
from ibro_lightning.studies.plan import ReportedStudy
from ibro_lightning.studies.power import pairs_needed, smallest_p_value
from ibro_lightning.studies.report.wording import Unit, listed, number, p_value, plural
from ibro_lightning.studies.results import FAILED, FINISHED, Results


def of_comparison(comparison: Comparison, study: ReportedStudy, unit: Unit, comparisons: int) -> list[str]:
    """What one comparison shows: the difference and its interval, whether it is significant, what it says about the
    difference that matters, and what the study could have found."""
    paired, level = comparison.paired, study.plan.level
    reference, other = study.label(comparison.reference), study.label(comparison.other)
    count = paired.difference.count
    if count == 0:
        return [f"{other} against {reference}: no seed has finished in both arms."]
    difference = paired.difference.estimate
    direction = "above" if difference > 0 else "below"
    distance = "exactly at" if difference == 0 else f"{unit.size(abs(difference))} {direction}"
    on_seeds = f"mean over {plural(count, 'seed')}, higher on {paired.better} and lower on {paired.worse} of them"
    sentences = [f"{other} ended {distance} {reference} ({on_seeds})."]
    if comparison.missing:
        names = f"{'Seeds' if len(comparison.missing) > 1 else 'Seed'} {listed(comparison.missing)}"
        sentences.append(f"{names} {'have' if len(comparison.missing) > 1 else 'has'} no result in one of the two.")
    if count < 2:
        return [*sentences, "One pair says nothing about other seeds."]
    share = f"{100 * (1 - level):g} %"
    corrected = f", {p_value(comparison.p_corrected)} after Holm's correction for {comparisons} comparisons"
    sentences.append(
        f"The {share} interval of the difference is {unit.range(paired.difference, '+')}{unit.of_difference}; the "
        f"sign-flip test gives p = {p_value(paired.p_value)}{corrected * (comparisons > 1)}."
    )
    return [*sentences, *_verdict(comparison, study, unit, comparisons)]


def _verdict(comparison: Comparison, study: ReportedStudy, unit: Unit, comparisons: int) -> list[str]:
    paired, level = comparison.paired, study.plan.level
    count = paired.difference.count
    size = unit.size(paired.detectable)
    found = f"With this spread and number of seeds, 80 % of studies would find a difference of {size} or more."
    if comparison.p_corrected <= level:
        return [f"At the level {level:g} the two arms differ.", *_relevance(comparison, study, unit), found]
    sentences = []
    if smallest_p_value(count) > level / comparisons:
        needed = pairs_needed(level, comparisons)
        sentences.append(
            f"With {plural(count, 'pair')} a sign-flip test cannot give less than "
            f"{p_value(smallest_p_value(count))}: no difference, however large, could have been significant here, "
            f"which takes {needed} pairs."
        )
        found = f"A t-test would find a difference of {size} or more in 80 % of studies with this spread."
    if not paired.difference.contains(0.0):
        sentences.append(
            "The interval, which is of this difference alone, is on one side of 0: that is a hint, not a finding."
        )
    sentences.append("The test finds no difference, which does not show that there is none.")
    return [*sentences, *_relevance(comparison, study, unit), found]


def _relevance(comparison: Comparison, study: ReportedStudy, unit: Unit) -> list[str]:
    """How the interval lies to the difference that matters."""
    matters, interval = study.plan.difference_that_matters, comparison.paired.difference
    if matters is None or math.isnan(interval.low):
        return []
    size = unit.size(matters)
    if interval.low >= matters or interval.high <= -matters:
        return [f"The whole interval is beyond the {size} that matter by the plan."]
    if -matters < interval.low and interval.high < matters:
        return [f"Differences of {size}, which matter by the plan, are outside the interval in both directions."]
    sides = [
        f"{side} by {size}"
        for side, inside in (("better", interval.high >= matters), ("worse", interval.low <= -matters))
        if inside
    ]
    return [f"That it is {' or '.join(sides)} or more, which matters by the plan, remains possible."]


def of_matched(matched: Matched, study: ReportedStudy, unit: Unit) -> str:
    """What one comparison at equal entropy shows."""
    reference, other = study.label(matched.reference), study.label(matched.other)
    interval = matched.difference.difference
    left = f"; {plural(matched.outside, 'seed')} left out, as no temperature gives {other} that entropy"
    left *= bool(matched.outside)
    if interval.count == 0:
        return f"Exploratory: on {matched.set}, {other} cannot be compared with {reference} at equal entropy{left}."
    difference, seeds = unit.estimate_of_difference(interval), plural(interval.count, "seed")
    return (
        f"Exploratory: on {matched.set}, at the entropy that {reference} has at temperature 1 "
        f"({number(matched.entropy, 3)} nats), {other} differs by {difference} over {seeds}{left}."
    )


def of_progress(results: Results) -> list[str]:
    """How many trials have finished, and what is missing."""
    planned, finished = results.planned_trials, len(results.finished)
    failed = [trial for trial in results.trials if trial.state == FAILED]
    others = planned - finished - len(failed)
    if finished == planned:
        return [f"All {plural(planned, 'trial')} have finished." if planned > 1 else "The one trial has finished."]
    counts = [f"{finished} of {plural(planned, 'trial')} have finished"]
    counts += [f"{len(failed)} failed"] * bool(failed) + [f"{others} have not ended"] * bool(others)
    text = ", ".join(counts) + ": numbers below are of finished trials only."
    warnings = []
    if others and any(trial.state == FINISHED for trial in results.trials):
        warnings.append("The study is not complete: what it shows may change, and looking early is not in the plan.")
    if failed:
        arms = listed(sorted({results.study.label(trial.arm) for trial in failed}))
        warnings.append(f"Trials of {arms} failed. If runs fail because they go badly, that arm's mean is too high.")
    return [text, *warnings]


def of_unequal_ends(results: Results, metric: str) -> list[str]:
    """A warning where arms were read at different iterations."""
    ends = results.last_iterations(metric)
    if len(set(ends.values())) < 2:
        return []
    each = listed([f"{results.study.label(arm)} after {end}" for arm, end in ends.items()])
    return [f"The arms were not trained for equally long: {each} iterations. Differences include that."]


def of_base_policies(results: Results) -> list[str]:
    """A warning where trials of one seed did not start from the same weights."""
    by_seed: dict[int, set[str]] = {}
    for trial in results.trials:
        if trial.base_policy:
            by_seed.setdefault(trial.seed, set()).add(trial.base_policy)
    apart = sorted(seed for seed, policies in by_seed.items() if len(policies) > 1)
    if not apart:
        return []
    seeds = f"{'Seeds' if len(apart) > 1 else 'Seed'} {listed(apart)}"
    return [f"{seeds}: not all arms started from the same base policy, so that pairing takes less away."]


def of_hours(results: Results) -> list[str]:
    """How long the finished trials took, all together."""
    if not results.hours:
        return []
    trials, wall, cpu = len(results.finished), results.hours["wall"], results.hours["cpu"]
    uncounted = "; warm starts are not counted" * bool(results.study.content.get("base_policy"))
    return [
        f"Time: the {plural(trials, 'finished trial')} took {number(wall, 1)} hours one after the other, and "
        f"{number(cpu, 1)} CPU hours{uncounted}."
    ]


def of_code(results: Results) -> list[str]:
    """Which code ran the trials."""
    codes: dict[str, int] = {}
    for trial in results.trials:
        if trial.code:
            codes[trial.code] = codes.get(trial.code, 0) + 1
    if not codes:
        return []
    each = listed([f"{code} ({plural(count, 'trial')})" for code, count in codes.items()])
    changed = " +changes: with changes that are not in the commit." * any("+" in code for code in codes)
    return [f"Code: commit {each}.{changed}"]
