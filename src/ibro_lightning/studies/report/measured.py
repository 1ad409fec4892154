"""The sections of a report beside the planned result: curves, matched entropy, sets, other metrics, questions."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ibro_lightning.studies import analysis
from ibro_lightning.studies.analysis import Comparison
from ibro_lightning.studies.report import figures
from ibro_lightning.studies.report.blocks import Block, Code, Figures, Section, Table, Text
from ibro_lightning.studies.report.wording import number, title_of, unit_of
from ibro_lightning.studies.results import Results

ALARM, NEVER = "alarm/", "–"


def curves(results: Results) -> list[Section]:
    primary = [results.study.plan.metric]
    drawn = [figures.curve(results, metric) for metric in [*primary, *analysis.other_outcomes(results)]]
    kept = [figure for figure in drawn if figure is not None]
    note = "Means over finished seeds, with t intervals at some iterations: pointwise, not for the curve as a whole."
    return [Section("Learning curves", [Text([note]), Figures(kept)])] if kept else []


def alarms(results: Results) -> list[Section]:
    """Which failures the runs themselves have recognised, and since when; no section if there were none."""
    names = [name for name in results.metrics if name.startswith(ALARM)]
    rows = [
        [results.study.label(arm), *(_raised(results, row, name) for name in names)]
        for row, arm in enumerate(results.arms)
    ]
    if not any(cell != NEVER for row in rows for cell in row[1:]):
        return []
    columns = ("arm", *(name.removeprefix(ALARM).replace("_", " ") for name in names))
    note = (
        "Trials in which an alarm was raised, and by which iteration: the end of the first block of iterations, over "
        "which a study averages curves. What raises an alarm is in docs/curves.md."
    )
    return [Section("Alarms", [Table(columns, rows, note)], exploratory=True)]


def _raised(results: Results, row: int, name: str) -> str:
    iterations, values = results.curves(name)
    values = values[row]  # [seeds, I]
    raised = np.nan_to_num(values) > 0
    trials, begins = int(np.isfinite(values).any(axis=1).sum()), iterations[raised.any(axis=0)]
    return f"{int(raised.any(axis=1).sum())} of {trials}, by {begins[0]}" if len(begins) else NEVER


def matched(results: Results) -> list[Section]:
    parts = analysis.temperature_metrics(results)
    if not parts:
        return []
    study, unit = results.study, unit_of("avg@1")
    rows = [
        [
            *(
                f"{study.label(one.other)} − {study.label(one.reference)}",
                one.set,
                str(one.difference.difference.count),
            ),
            *(str(one.outside), f"{number(one.entropy, 4)}", unit.difference(one.difference.difference.estimate)),
            *(unit.range(one.difference.difference, "+"), number(one.difference.effect_size)),
        ]
        for one in analysis.matched_entropy(results)
    ]
    share = f"{100 * (1 - study.plan.level):g} %"
    columns = ("comparison", "set", "pairs", "outside", "entropy", "difference", share, "g")
    note = (
        "For each seed, the other arm's accuracy is interpolated between its temperatures to the entropy (nats per "
        "token) that the reference has at temperature 1. outside: seeds without such a temperature; nothing is "
        "extrapolated. No p-values: no test of this was planned."
    )
    unmatched = "Nothing is compared at equal entropy: the results have no entropy at temperature 1."
    needed = bool(study.plan.comparisons) and not rows
    tables: list[Block] = [Table(columns, rows, note, words=2)] if rows else [Text([unmatched])] * needed
    images = Figures([figures.against_entropy(results, part) for part in parts])
    return [Section("Accuracy at matched entropy", [*tables, images], exploratory=True)]


def sets(results: Results) -> list[Section]:
    sets = {name: metric for name, metric in analysis.final_sets(results).items() if results.last_iterations(metric)}
    if not sets:
        return []
    return [Section("By evaluation set", [Figures([figures.bars(results, sets)])], exploratory=len(sets) > 1)]


def others(results: Results) -> list[Section]:
    """Other metrics at the end: arms and planned pairs, with intervals and without tests."""
    metrics = [metric for metric in analysis.other_outcomes(results) if results.last_iterations(metric)]
    if not metrics:
        return []
    study = results.study
    finals = [_finals(results, metric) for metric in metrics]
    arms = [[study.label(arm), *(of_metric[arm] for of_metric in finals)] for arm in results.arms]
    share, titles = f"{100 * (1 - study.plan.level):g} %", [title_of(metric) for metric in metrics]
    note = (
        f"Means over seeds with {share} intervals, at the last iteration that has the metric. No p-values: no test "
        "of these was planned."
    )
    tables = [Table(("arm", *titles), arms, note)]
    by_metric = {metric: analysis.comparisons(results, metric) for metric in metrics}
    differences = [
        [
            f"{study.label(one.other)} − {study.label(one.reference)}",
            *(unit_of(metric).estimate_of_difference(by_metric[metric][row].paired.difference) for metric in metrics),
        ]
        for row, one in enumerate(by_metric[metrics[0]])
    ]
    tables += [Table(("difference", *titles), differences)] if differences else []
    return [Section("Other metrics at the end", tables, exploratory=True)]


def _finals(results: Results, metric: str) -> dict[str, str]:
    unit = unit_of(metric)
    return {arm.arm: unit.estimate(arm.mean) for arm in analysis.arm_results(results, metric)}


def questions(results: Results, compared: Sequence[Comparison]) -> list[Section]:
    blocks: list[Block] = []
    for one in compared:
        gained, lost = analysis.changed_questions(results, one.reference, one.other)
        if not gained and not lost:
            continue
        names = [results.study.label(arm) for arm in (one.reference, one.other)]
        rows = [
            [*(change.set, _short(change.text, 60), _short(change.answer, 40)), *_shares(change)]
            for change in [*gained, *lost]
        ]
        blocks += [Text([f"{names[1]} against {names[0]}:"])]
        blocks += [Table(("set", "question", "answer", *names, "change", "seeds"), rows, words=3)]
        blocks += [_example(change, names) for change in [*gained[:1], *lost[:1]]]
    note = (
        "Mean accuracy over seeds, final evaluation. These are the largest changes of all questions, chosen because "
        "they are large: repeated with other seeds, they would be smaller."
    )
    return [Section("Questions that changed most", [Text([note]), *blocks], exploratory=True)] if blocks else []


def _shares(change: analysis.Change) -> list[str]:
    unit = unit_of("avg@1")
    return [unit.value(change.before), unit.value(change.after), unit.difference(change.change), str(change.seeds)]


def _example(change: analysis.Change, names: Sequence[str]) -> Code:
    seed = change.example_before.seed
    texts = [
        f"{name}, {'right' if sample.right else 'wrong'}:\n{_short(sample.response, 1500, lines=True)}"
        for name, sample in zip(names, (change.example_before, change.example_after), strict=True)
    ]
    question = _short(change.text, 1500, lines=True)
    return Code(f"{question}\n\n" + "\n\n".join(texts), f"Samples of seed {seed}: {_short(change.text, 50)}")


def _short(text: str, limit: int, *, lines: bool = False) -> str:
    text = text.strip() if lines else " ".join(text.split())
    return text if len(text) <= limit else text[: limit - 1] + "…"
