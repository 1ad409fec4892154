"""The figures as text and as JSON."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from peers.figures import (
    Spread,
    gain,
    median_cpu_s,
    median_wall_s,
    phase_seconds,
    ratios,
    tokens_per_second,
)
from peers.work import Report

Reports = Mapping[str, Sequence[Report]]


def side_table(reports: Reports) -> str:
    """Per side: seconds, memory and work; then the ratios of all pairs of sides."""
    widths = {"wall s": 9, "peak MiB": 10, "completions": 13, "length": 8, "steps": 7, "threads": 9}
    lines = [f"{'':10}{'CPU s / iteration':>26}" + "".join(f"{name:>{width}}" for name, width in widths.items())]
    for side, own in reports.items():
        warm = [one for report in own for one in report.warm]
        cpu = Spread.of([one.cpu_s for one in warm])
        wall = statistics.median(one.wall_s for one in warm)
        memory = statistics.median(report.peak_mib for report in own)
        length = sum(one.generated for one in warm) / sum(one.completions for one in warm)
        lines.append(
            f"{side:10}{cpu.text():>26}{wall:9.3f}{memory:10.0f}{warm[0].completions:13}{length:8.1f}"
            f"{warm[0].optimizer_steps:7}{own[0].threads:9}"
        )
    for one, other in pairs(reports):
        cpu, wall, memory = all_ratios(reports[one], reports[other])
        lines.append(f"{one} / {other}: CPU {cpu.text()}, wall {wall.text()}, peak memory {memory.text()}")
    return "\n".join(lines)


def learning_table(reports: Reports) -> str:
    """Accuracy of what was trained on, in the first and in the last quarter of the iterations."""
    lines = []
    for side, own in reports.items():
        early, late, error = gain(own)
        lines.append(f"{side}: accuracy {early:.3f} -> {late:.3f} (standard error of the difference {error:.3f})")
    return "\n".join(lines)


def pairs(reports: Reports) -> list[tuple[str, str]]:
    sides = list(reports)
    return [(one, other) for index, one in enumerate(sides) for other in sides[index + 1 :]]


def all_ratios(one: Sequence[Report], other: Sequence[Report]) -> tuple[Spread, Spread, Spread]:
    """Of CPU seconds, wall seconds and peak memory."""
    measures = (median_cpu_s, median_wall_s, lambda report: report.peak_mib)
    cpu, wall, memory = (ratios([*map(measure, one)], [*map(measure, other)]) for measure in measures)
    return cpu, wall, memory


def phase_table(reports: Reports) -> str:
    """CPU seconds of our phases, their share of the iteration, and tokens per CPU second."""
    timed = {side: own for side, own in reports.items() if phase_seconds(own)}
    heads = "".join(f"{side + ' CPU s':>18}{'share':>7}{'tokens/s':>10}" for side in timed)
    lines = [f"{'phase':12}{heads}" + ("   ours / baseline" if "baseline" in timed else "")]
    for name in dict.fromkeys(name for own in timed.values() for name in phase_seconds(own)):
        line = f"{name:12}"
        for own in timed.values():
            seconds = phase_seconds(own).get(name, 0.0)
            share = seconds / statistics.median(one.cpu_s for report in own for one in report.warm)
            line += f"{seconds:18.4f}{share:7.1%}{tokens_per_second(own, name):10.0f}"
        if "baseline" in timed and phase_seconds(timed["baseline"]).get(name):
            line += f"   {phase_ratio(timed, name).text()}"
        lines.append(line)
    return "\n".join(lines)


def phase_ratio(reports: Reports, name: str) -> Spread:
    ours, baseline = ([phase_seconds([report]).get(name, 0.0) for report in reports[s]] for s in ("ours", "baseline"))
    return ratios(ours, baseline)


def summary(reports: Reports, failed: Sequence[str]) -> dict[str, Any]:
    """All figures of the tables, for a file."""
    names = ("cpu", "wall", "memory")
    return {
        "versions": {side: own[0].versions for side, own in reports.items()},
        "cpu_s": {side: vars(Spread.of([x.cpu_s for r in own for x in r.warm])) for side, own in reports.items()},
        "peak_mib": {side: statistics.median(report.peak_mib for report in own) for side, own in reports.items()},
        "phases": {side: phase_seconds(own) for side, own in reports.items()},
        "ratios": {
            f"{one} / {other}": dict(zip(names, map(vars, all_ratios(reports[one], reports[other])), strict=True))
            for one, other in pairs(reports)
        },
        "failed": list(failed),
    }
