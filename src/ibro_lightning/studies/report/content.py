"""The sections of a report, made from a study's results."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path

from ibro_lightning.studies import analysis
from ibro_lightning.studies.analysis import Comparison
from ibro_lightning.studies.history import WARNING, History
from ibro_lightning.studies.power import minimum_detectable_difference
from ibro_lightning.studies.report import conclusions, figures, measured
from ibro_lightning.studies.report.blocks import Block, Code, Figures, Items, Notice, Report, Section, Table, Text
from ibro_lightning.studies.report.wording import listed, number, p_value, plural, title_of, unit_of
from ibro_lightning.studies.results import FAILED, FINISHED, STUDY, Results


def report_of(results: Results, history: History) -> Report:
    """The whole report. Sections without data are left out."""
    study = results.study
    title = f"Study: {study.name}" if results.planned else "Report on runs"
    metric = study.plan.metric
    any_finished = bool(results.finished) and bool(results.last_iterations(metric))
    compared = analysis.comparisons(results) if any_finished else []
    sections = [_plan(results, history, compared)] if results.planned else []
    if results.discussion:
        sections += [_discussion(results)]
    if any_finished:
        sections += [_final(results, compared, metric), *measured.curves(results), *measured.alarms(results)]
        sections += [*measured.matched(results)]
        sections += [*measured.sets(results), *measured.others(results), *measured.questions(results, compared)]
    sections += [*_failures(results), _repeat(results, history)]
    return Report(title, sections, [*_lead(results, compared), Text([_reading(study.plan.level)])])


def _reading(level: float) -> str:
    return (
        f"The unit is a seed: a warm start, its training run and its evaluation. Intervals are {100 * (1 - level):g} "
        "% t intervals over seeds, for seeds of this task and these settings only. They are not corrected for the "
        "number of comparisons; p-values are. What both really hold with few seeds is in docs/studies.md."
    )


def _lead(results: Results, compared: Sequence[Comparison]) -> list[Block]:
    metric, study = results.study.plan.metric, results.study
    progress, *warnings = conclusions.of_progress(results)
    blocks: list[Block] = [Text([progress]), *(Notice(warning) for warning in warnings)]
    if not results.planned:
        blocks.append(Notice("These runs follow no plan: all that is below is exploratory."))
    if results.finished and (unequal := conclusions.of_unequal_ends(results, metric)):
        blocks.append(Notice(unequal[0]))
    blocks += [Notice(text) for text in conclusions.of_base_policies(results)]
    unit = unit_of(metric)
    shown = [" ".join(conclusions.of_comparison(one, study, unit, len(compared))) for one in compared]
    shown += [conclusions.of_matched(matched, study, unit_of("avg@1")) for matched in analysis.matched_entropy(results)]
    if shown:
        blocks += [Text([f"What the numbers show ({title_of(metric)}, last evaluation):"]), Items(shown)]
    return blocks


def _discussion(results: Results) -> Section:
    written = (
        "Written by people who had seen the results, unlike the plan; the sentences above are made from the numbers."
    )
    return Section("Discussion", [Notice(written), Text(results.discussion)])


def _plan(results: Results, history: History, compared: Sequence[Comparison]) -> Section:
    plan = results.study.plan
    sentences = history.sentences()
    others = [sentence for sentence in sentences if not sentence.startswith(WARNING)]
    warnings = [_capital(sentence.removeprefix(WARNING)) for sentence in sentences if sentence.startswith(WARNING)]
    blocks: list[Block] = [
        Text([" ".join(others)] * bool(others)),
        *(Notice(text) for text in warnings),
        Code(plan.text),
    ]
    blocks.append(Text([f"sha256 of this text, with its last line feed: {plan.digest}", *_power(results, compared)]))
    return Section("The plan", blocks)


def _power(results: Results, compared: Sequence[Comparison]) -> list[str]:
    """What the plan could expect to find, from the pilot's spread, and what the spread turned out to be."""
    plan, seeds = results.study.plan, len(results.study.seeds)
    if plan.paired_sd is None or not seeds:
        return []
    count = max(1, len(plan.comparisons))
    unit, level = unit_of(plan.metric), plan.level / count
    size = unit.size(minimum_detectable_difference(plan.paired_sd, seeds, level))
    shared = f" divided by {count} comparisons" * (count > 1)
    expected = (
        f"By the plan's standard deviation of paired differences ({unit.size(plan.paired_sd)}), "
        f"{plural(seeds, 'seed')} find a difference of {size} in 80 % of such studies, at the level "
        f"{plan.level:g}{shared}."
    )
    spreads = [one.paired.sd for one in compared if math.isfinite(one.paired.sd)]
    if not spreads:
        return [expected]
    low, high = (unit.size(spread) for spread in (min(spreads), max(spreads)))
    found = f"In this study it was {low}" + f" to {high}" * (low != high)
    if min(spreads) > plan.paired_sd:
        found += ", so that the plan expected to find more than it could"
    return [expected, f"{found}: the column detectable under Result goes by that."]


def _final(results: Results, compared: Sequence[Comparison], metric: str) -> Section:
    study, unit = results.study, unit_of(metric)
    rows = [
        [
            *(study.label(arm.arm), str(arm.mean.count), unit.value(arm.mean.estimate), unit.range(arm.mean)),
            *(unit.value(arm.middle.estimate), unit.range(arm.middle), unit.size(arm.sd)),
            *(unit.value(arm.lowest), unit.value(arm.highest), "–" if arm.iteration is None else str(arm.iteration)),
        ]
        for arm in analysis.arm_results(results, metric)
    ]
    share = f"{100 * (1 - study.plan.level):g} %"
    columns = ("arm", "seeds", "mean", f"mean, {share}", "IQM", f"IQM, {share}", "sd", "lowest", "highest", "iteration")
    note = "IQM: interquartile mean, with a bootstrap interval from 5 seeds on. sd: standard deviation over seeds."
    blocks: list[Block] = [Text([f"{title_of(metric)} at the last evaluation."]), Table(columns, rows, note)]
    if compared:
        blocks += [_comparison_table(results, compared, metric)]
        blocks += [Figures([figures.differences(results, compared, metric)])]
    return Section("Result", blocks, exploratory=not results.planned)


def _comparison_table(results: Results, compared: Sequence[Comparison], metric: str) -> Table:
    study, unit = results.study, unit_of(metric)
    rows = []
    for comparison in compared:
        paired = comparison.paired
        rows.append(
            [
                f"{study.label(comparison.other)} − {study.label(comparison.reference)}",
                *(str(paired.difference.count), unit.difference(paired.difference.estimate)),
                *(unit.range(paired.difference, "+"), p_value(paired.p_value), p_value(comparison.p_corrected)),
                *(number(paired.effect_size), f"{paired.better}:{paired.worse}"),
                *(number(paired.probability_of_improvement), unit.size(paired.detectable)),
                *(unit.size(paired.sd), number(paired.correlation)),
            ]
        )
    share = f"{100 * (1 - study.plan.level):g} %"
    columns = ("comparison", "pairs", "difference", share, "p", "p, Holm", "g", "higher:lower", "P(better)")
    level = study.plan.level / max(1, len(compared))
    note = (
        "Differences are paired by seed. p: two-sided sign-flip test; p, Holm: corrected for all of these "
        "comparisons. g: Hedges' effect size of the paired differences. higher:lower: seeds. P(better): that a run "
        "of the first is higher than a run of the second, whatever their seeds. detectable: the difference that 80 "
        f"% of such studies would find, at the level {level:.2g}, with this sd of paired differences. r: correlation "
        "of the two arms over seeds; where it is near 0, pairing has gained nothing."
    )
    return Table((*columns, "detectable", "sd of pairs", "r"), rows, note)


def _failures(results: Results) -> list[Section]:
    rows = [
        [results.study.label(trial.arm), str(trial.seed), trial.state, str(trial.attempts), trial.error or "–"]
        for trial in results.trials
        if trial.state == FAILED or (trial.state != FINISHED and trial.error)
    ]
    if not rows:
        return []
    table = Table(("arm", "seed", "state", "attempts", "reason"), rows, words=5)
    return [Section("Trials without a result", [table])]


def _repeat(results: Results, history: History) -> Section:
    facts = [f"Seeds: {listed(results.seeds)}.", *conclusions.of_hours(results), *conclusions.of_code(results)]
    blocks: list[Block] = [Text(facts)]
    if results.planned:
        file = history.path or f"studies/{results.study.name}.yaml"
        commands = (
            f"python -m ibro_lightning study --config {file}\npython -m ibro_lightning report {_place(results.folder)}"
        )
        settings = Code((results.folder / STUDY).read_text(), "The study file, with all settings")
        blocks += [Code(commands), settings]
    else:
        blocks.append(
            Text(["Each run's config.yaml repeats it: python -m ibro_lightning fit --config RUN/config.yaml."])
        )
    if results.versions:
        blocks.append(Code(json.dumps(dict(results.versions), indent=2, ensure_ascii=False), "Versions"))
    return Section("To repeat it", blocks)


def _place(folder: Path) -> str:
    """A folder from where the command was given, so that a report does not depend on whose machine wrote it."""
    here, folder = Path.cwd(), folder.resolve()
    return str(folder.relative_to(here)) if folder.is_relative_to(here) else str(folder)


def _capital(sentence: str) -> str:
    return sentence[:1].upper() + sentence[1:]
