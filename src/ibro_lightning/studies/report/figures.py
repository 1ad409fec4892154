"""The report's figures, as PNG: arms differ in line style, marker and hatch, and can be told in black and white."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ibro_lightning.studies.analysis import Comparison, curve_intervals, temperature_curves
from ibro_lightning.studies.extras import extra_packages
from ibro_lightning.studies.report.wording import title_of, unit_of
from ibro_lightning.studies.results import Results
from ibro_lightning.studies.statistics import mean_interval

SOFTWARE = "ibro_lightning report"
"""In every image's metadata: how a later report knows that it may replace it."""
# Okabe and Ito (2008): told apart with any colour vision, and of different lightness.
COLOURS = ("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#7F7F7F")
LINES: tuple[Any, ...] = ("-", "--", "-.", ":", (0, (6, 1, 1, 1, 1, 1)), (0, (1, 3)), (0, (8, 3)), (0, (3, 1, 1, 1)))
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
HATCHES = ("", "///", "...", "xxx", "\\\\\\", "ooo", "+++", "---")
WIDTH = 4.6
"""Of a figure, in inches: at 360 pixels of a phone's page, its text of 9 points is 10 pixels high."""
BARS = 6
"""Iterations with an interval, per curve."""


@dataclass(frozen=True)
class Figure:
    """An image and its words."""

    name: str
    """Of its file, without ``.png``."""
    png: bytes
    alternative: str
    """For those who do not see it."""
    caption: str = ""


def curve(results: Results, metric: str) -> Figure | None:
    """Mean over finished seeds by iteration, with t intervals at some iterations; None where no trial has finished."""
    iterations, values = results.curves(metric)
    unit, level = unit_of(metric), 1 - results.study.plan.level
    figure, axes = _axes()
    ends = []
    for number, arm in enumerate(results.arms):
        finished = [(arm, seed) in results.finished for seed in results.seeds]
        mean, low, high = unit.scale * curve_intervals(values[number][finished], level)
        here = np.flatnonzero(np.isfinite(mean))
        if not len(here):
            continue
        label = results.study.label(arm)
        every = max(1, len(here) // 8)
        axes.plot(
            *(iterations[here], mean[here]), label=label, markevery=(number % every, every), **_line(number), lw=1.4
        )
        at = _spread(here, number, len(results.arms))
        error = np.nan_to_num(np.stack([mean - low, high - mean])[:, at])
        axes.errorbar(iterations[at], mean[at], error, fmt="none", ecolor=_line(number)["color"], capsize=3, lw=1)
        ends.append(f"{label} ends at {unit.value(mean[here[-1]] / unit.scale)}")
    if not ends:
        return None
    axes.set(xlabel="iteration", ylabel=_in(unit.sign).strip())
    axes.set_title(title_of(metric), fontsize=10)
    return Figure(
        _file_name("curve", metric), _png(figure, axes), f"{title_of(metric)} by iteration: {'; '.join(ends)}."
    )


def differences(results: Results, compared: Sequence[Comparison], metric: str) -> Figure:
    """Every comparison's mean difference with its interval, and each seed's difference as a dot."""
    unit, matrix = unit_of(metric), results.last(metric)
    figure, axes = _axes(height=1.2 + 0.55 * len(compared))
    words = []
    for row, comparison in enumerate(compared):
        first, second = (matrix[results.arms.index(arm)] for arm in (comparison.reference, comparison.other))
        own = unit.scale * (second - first)
        interval = comparison.paired.difference
        name = f"{results.study.label(comparison.other)}\n− {results.study.label(comparison.reference)}"
        axes.plot(own, np.full(len(own), row + 0.22), "o", mfc="none", mec="#555555", ms=4, mew=0.8)
        ends = unit.scale * np.array([interval.low, interval.high])
        axes.plot(ends, [row, row], "-|", color="black", lw=1.8, ms=9)
        axes.plot([unit.scale * interval.estimate], [row], "s", color="black", ms=6)
        axes.text(-0.02, row, name, transform=axes.get_yaxis_transform(), ha="right", va="center", fontsize=8)
        words.append(f"{name.replace(chr(10), ' ')}: {unit.estimate_of_difference(interval)}")
    axes.axvline(0, color="black", lw=0.8)
    if (matters := results.study.plan.difference_that_matters) is not None:
        for side in (-1, 1):
            axes.axvline(side * unit.scale * matters, color="black", lw=0.8, ls=":")
    axes.set_yticks([])
    axes.set_ylim(len(compared) - 0.5, -0.5)
    axes.set_xlabel(f"difference of {title_of(metric)}{_in(unit.of_difference)}")
    caption = "Squares: mean difference with its interval. Circles: one seed each."
    dotted = " Dotted: the difference that matters by the plan."
    caption += dotted * (results.study.plan.difference_that_matters is not None)
    return Figure("differences", _png(figure, axes, legend=False), "; ".join(words) + ".", caption)


def against_entropy(results: Results, part: str) -> Figure:
    """Accuracy over entropy on one set, one point per temperature: means over seeds, with intervals of the accuracy."""
    temperatures, accuracy, entropy = temperature_curves(results, part)
    figure, axes = _axes()
    for number, arm in enumerate(results.arms):
        over = np.array([np.nanmean(column) if np.isfinite(column).any() else np.nan for column in entropy[number].T])
        mean, low, high = 100 * curve_intervals(accuracy[number], 1 - results.study.plan.level)
        if np.isfinite(mean).any():
            axes.plot(over, mean, label=results.study.label(arm), **_line(number), lw=1.4)
            error = np.nan_to_num(np.stack([mean - low, high - mean]))
            axes.errorbar(over, mean, error, fmt="none", ecolor=_line(number)["color"], capsize=3, lw=1)
    axes.set(xlabel="entropy in nats per token", ylabel="accuracy in %")
    axes.set_title(f"Accuracy over entropy on {part}", fontsize=10)
    span = ", ".join(f"{temperature:g}" for temperature in temperatures)
    caption = f"Final policies at temperatures {span}, from left to right."
    return Figure(_file_name("entropy", part), _png(figure, axes), f"Accuracy over entropy on {part}.", caption)


def bars(results: Results, sets: dict[str, str]) -> Figure:
    """Final accuracy on each set, arm by arm, with intervals; ``sets``: ``{set: metric}``."""
    figure, axes = _axes(width=max(WIDTH, min(9.0, 0.32 * len(sets) * len(results.arms) + 2)))
    width = 0.8 / len(results.arms)
    words = []
    for number, arm in enumerate(results.arms):
        intervals = [
            mean_interval(results.last(metric)[number], 1 - results.study.plan.level) for metric in sets.values()
        ]
        height = 100 * np.array([interval.estimate for interval in intervals])
        error = 100 * np.array([[i.estimate - i.low, i.high - i.estimate] for i in intervals]).T
        at = np.arange(len(sets)) + (number - (len(results.arms) - 1) / 2) * width
        label = results.study.label(arm)
        axes.bar(
            at, np.nan_to_num(height), width, color="white", edgecolor="black", hatch=_of(HATCHES, number), label=label
        )
        axes.errorbar(at, np.nan_to_num(height), np.nan_to_num(error), fmt="none", ecolor="black", capsize=2, lw=1)
        words += [f"{label} on {name}: {height[place]:.1f} %" for place, name in enumerate(sets)]
    axes.set_xticks(range(len(sets)), list(sets))
    axes.set(ylabel="in %")
    axes.set_title("Accuracy at the end, by evaluation set", fontsize=10)
    return Figure("sets", _png(figure, axes), "; ".join(words) + ".")


def _axes(width: float = WIDTH, height: float = 3.4) -> tuple[Any, Any]:
    with extra_packages():
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure as Canvas
    figure = Canvas(figsize=(width, height), dpi=144, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.grid(True, color="#DDDDDD", lw=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _png(figure: Any, axes: Any, *, legend: bool = True) -> bytes:
    handles, labels = axes.get_legend_handles_labels()
    if legend and len(labels) > 1:
        longest = max(map(len, labels))
        columns = 1 if longest > 24 else 2 if longest > 9 else 3
        figure.set_figheight(figure.get_figheight() + 0.2 * math.ceil(len(labels) / columns))
        figure.legend(
            handles, labels, loc="outside lower center", ncols=columns, fontsize=9, frameon=False, handlelength=3.6
        )
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": SOFTWARE})
    return buffer.getvalue()


def _line(number: int) -> dict[str, Any]:
    return {
        "color": _of(COLOURS, number),
        "ls": _of(LINES, number),
        "marker": _of(MARKERS, number),
        "ms": 5,
        "mfc": "white",
    }


def _of(choices: Sequence[Any], number: int) -> Any:
    return choices[number % len(choices)]


def _spread(here: np.ndarray[Any, Any], number: int, arms: int) -> np.ndarray[Any, Any]:
    """Positions for intervals, the last included, shifted from arm to arm so that they do not hide each other."""
    if len(here) <= BARS:
        return here
    step = len(here) / BARS
    shift = step * number / max(1, arms)
    places = {int(len(here) - 1 - shift - step * bar) for bar in range(BARS)}
    return here[sorted(place for place in places if place >= 0)]


def _in(unit: str) -> str:
    return f" in{unit if unit.startswith(' ') else ' ' + unit}" if unit.strip() else ""


def _file_name(kind: str, metric: str) -> str:
    return f"{kind}_" + "".join(letter if letter.isalnum() else "_" for letter in metric)
