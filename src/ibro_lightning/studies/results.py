"""The results of a study: points of curves by arm and seed, and how every trial went."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ibro_lightning.errors import ConfigError
from ibro_lightning.studies.plan import ReportedStudy, read_reported

Column = np.ndarray[Any, Any]
Matrix = np.ndarray[Any, np.dtype[np.float64]]
"""``[arms, seeds]`` or ``[arms, seeds, iterations]``; NaN where there is no result."""
FINISHED, FAILED = "finished", "failed"
RESULTS, TIMINGS, TRIALS, QUESTIONS, VERSIONS, STUDY, DISCUSSION = (
    "results.parquet",
    "timings.parquet",
    "trials.parquet",
    "questions.parquet",
    "versions.json",
    "study.yaml",
    "discussion.md",
)


@dataclass(frozen=True)
class Trial:
    """One arm with one seed."""

    arm: str
    seed: int
    state: str
    """``finished`` or ``failed``; others, such as ``running``, are possible and are neither."""
    attempts: int = 1
    error: str = ""
    """Why it failed, one line."""
    base_policy: str = ""
    """Digest of the weights that it started from; empty where there is no base policy."""
    code: str = ""
    """Commit of the code that ran it, with ``+changes`` if files differed from it."""


@dataclass(frozen=True)
class Question:
    """A question of the final evaluation, as one trial answered it."""

    arm: str
    seed: int
    set: str
    question: str
    text: str
    answer: str
    avg: float
    """Mean accuracy over the samples."""
    response: str
    """One of the samples, and whether it is right."""
    right: bool


@dataclass(frozen=True)
class Points:
    """The points of all curves, as columns of equal length ``[P]``; arms and metrics are numbers of their names."""

    arm_names: tuple[str, ...]
    metric_names: tuple[str, ...]
    arm: Column
    seed: Column
    iteration: Column
    metric: Column
    value: Column

    @classmethod
    def of(cls, table: pa.Table) -> Points:
        """Of a table with these columns; raises pyarrow's errors where one has another type."""
        arm, metric = (table[name].combine_chunks().cast(pa.string()).dictionary_encode() for name in ("arm", "metric"))
        return cls(
            arm_names=tuple(arm.dictionary.to_pylist()),
            metric_names=tuple(metric.dictionary.to_pylist()),
            arm=arm.indices.to_numpy().astype(np.int64),
            seed=table["seed"].to_numpy().astype(np.int64),
            iteration=table["iteration"].to_numpy().astype(np.int64),
            metric=metric.indices.to_numpy().astype(np.int64),
            value=table["value"].to_numpy().astype(np.float64),
        )

    @cached_property
    def rows(self) -> dict[str, Column]:
        """``{metric: its rows}``"""
        order = np.argsort(self.metric, kind="stable")
        ends = np.cumsum(np.bincount(self.metric, minlength=len(self.metric_names)))
        return dict(zip(self.metric_names, np.split(order, ends[:-1]), strict=True)) if self.metric_names else {}

    def repeated(self) -> str | None:
        """Which point there is twice, in words; None if each is there once."""
        keys = np.zeros(len(self.value), dtype=np.int64)
        for column in (self.arm, self.seed, self.metric, self.iteration):
            names, codes = np.unique(column, return_inverse=True)
            keys = keys * len(names) + codes
        order = np.argsort(keys, kind="stable")
        twice = np.flatnonzero(np.diff(keys[order]) == 0)
        if not len(twice):
            return None
        row = order[twice[0]]
        trial = f"{self.arm_names[self.arm[row]]}/seed_{self.seed[row]}"
        return f"{trial} has {self.metric_names[self.metric[row]]} twice at iteration {self.iteration[row]}"


@dataclass(frozen=True)
class Results:
    """All that the report knows of a study."""

    folder: Path
    study: ReportedStudy
    points: Points
    trials: tuple[Trial, ...]
    questions: tuple[Question, ...] = ()
    versions: Mapping[str, Any] = field(default_factory=dict)
    planned: bool = True
    """Whether there is a plan from before the results; not so for runs that were not made by ``study``."""
    hours: Mapping[str, float] = field(default_factory=dict)
    """``wall`` and ``cpu``: hours of all finished trials together; empty where nothing timed them."""
    discussion: tuple[str, ...] = ()
    """Paragraphs that people wrote about the results, in :data:`DISCUSSION` beside them."""

    @cached_property
    def arms(self) -> tuple[str, ...]:
        """In the order of the study file; arms that it does not name come last."""
        return tuple(dict.fromkeys([*self.study.labels, *(trial.arm for trial in self.trials)]))

    @cached_property
    def seeds(self) -> tuple[int, ...]:
        """In ascending order: those of the study file, and any others that were run."""
        return tuple(sorted({*self.study.seeds, *(trial.seed for trial in self.trials)}))

    @cached_property
    def metrics(self) -> tuple[str, ...]:
        """Names of all curves, sorted."""
        return tuple(sorted(self.points.metric_names))

    @cached_property
    def finished(self) -> frozenset[tuple[str, int]]:
        """``(arm, seed)`` of the trials that have finished."""
        return frozenset((trial.arm, trial.seed) for trial in self.trials if trial.state == FINISHED)

    @property
    def planned_trials(self) -> int:
        """How many trials the study has."""
        return len({*((arm, seed) for arm in self.study.labels for seed in self.study.seeds)} | self._known)

    @property
    def _known(self) -> set[tuple[str, int]]:
        return {(trial.arm, trial.seed) for trial in self.trials}

    def curves(self, metric: str) -> tuple[Column, Matrix]:
        """``(iterations [I], values [arms, seeds, I])`` of one metric; unfinished and failed trials are included as far
        as they came. ConfigError if no trial has it."""
        if metric not in self.points.rows:
            raise ConfigError("metric", metric, f"no trial has it: choose one of {_some(self.metrics, metric)}")
        here = self.points.rows[metric]
        iterations, columns = np.unique(self.points.iteration[here], return_inverse=True)
        values = np.full((len(self.arms), len(self.seeds), len(iterations)), np.nan)
        arms = np.array([self.arms.index(arm) for arm in self.points.arm_names])
        seeds = np.searchsorted(self.seeds, self.points.seed[here])
        values[arms[self.points.arm[here]], seeds, columns] = self.points.value[here]
        return iterations, values

    def last_iterations(self, metric: str) -> dict[str, int]:
        """``{arm: the last iteration at which a finished trial of it has the metric}``; arms without one are absent."""
        iterations, values = self.curves(metric)
        values = np.where(self._is_finished[:, :, None], values, np.nan)
        last = {}
        for arm, of_arm in zip(self.arms, values, strict=True):
            if (there := np.isfinite(of_arm).any(axis=0)).any():
                last[arm] = int(iterations[there][-1])
        return last

    def last(self, metric: str) -> Matrix:
        """``[arms, seeds]`` of a metric at its last iteration, finished trials only: NaN for a trial that has no value
        at the last iteration of its arm."""
        iterations, values = self.curves(metric)
        end = self.last_iterations(metric)
        matrix = np.full(values.shape[:2], np.nan)
        for row, arm in enumerate(self.arms):
            if arm in end:
                matrix[row] = values[row, :, np.searchsorted(iterations, end[arm])]
        return np.where(self._is_finished, matrix, np.nan)

    @cached_property
    def _is_finished(self) -> np.ndarray[Any, Any]:
        return np.array([[(arm, seed) in self.finished for seed in self.seeds] for arm in self.arms], dtype=bool)


def read_results(folder: Path) -> Results:
    """Read what ``study`` has written. A study that is still running gives the trials so far.

    Raises:
        ConfigError: a file is missing, cannot be read or lacks a column; or a trial has a point twice.
    """
    study = read_reported(folder / STUDY)
    points = _points(folder / RESULTS)
    rows = _table(folder / TRIALS, ("arm", "seed", "state", "attempts", "error"), ("base_policy", "code"))
    trials = tuple(Trial(**dict(zip(rows, row, strict=True))) for row in zip(*rows.values(), strict=True))
    known = {(trial.arm, trial.seed) for trial in trials}
    for arm, seed in sorted({*zip(points.arm.tolist(), points.seed.tolist(), strict=True)}):
        if (points.arm_names[arm], seed) not in known:
            remedy = f"{TRIALS} has no trial {points.arm_names[arm]}/seed_{seed}: run `study` again, which writes both"
            raise ConfigError("report", str(folder / RESULTS), remedy)
    questions, versions = _questions(folder / QUESTIONS), _versions(folder / VERSIONS)
    hours, discussion = _hours(folder / TIMINGS), _paragraphs(folder / DISCUSSION)
    return Results(folder, study, points, trials, questions, versions, hours=hours, discussion=discussion)


def _points(path: Path) -> Points:
    table = _read(path, ("arm", "seed", "iteration", "metric", "value"))
    try:
        points = Points.of(table)
    except (ValueError, TypeError, pa.ArrowException) as error:
        raise ConfigError("report", str(path), f"a column has another type than it should have: {error}") from error
    if (twice := points.repeated()) is not None:
        raise ConfigError("report", str(path), f"{twice}: run `study` again, which writes every point once")
    return points


def _read(path: Path, columns: Sequence[str], optional: Sequence[str] = ()) -> pa.Table:
    if not path.is_file():
        raise ConfigError("report", str(path), "this file is missing: run `study` again, which writes it")
    try:
        there = pq.read_schema(path).names
        missing = [name for name in columns if name not in there]
        if missing:
            raise ValueError(f"it has no column {', '.join(missing)}")
        return pq.read_table(path, columns=[*columns, *(name for name in optional if name in there)])
    except (OSError, ValueError, pa.ArrowException) as error:
        raise ConfigError("report", str(path), f"this file cannot be read: {error}") from error


def _table(path: Path, columns: Sequence[str], optional: Sequence[str] = ()) -> dict[str, list[Any]]:
    """``{column: values}``, an ``optional`` column where there is one."""
    table = _read(path, columns, optional)
    return {name: table[name].to_pylist() for name in table.column_names}


def _questions(path: Path) -> tuple[Question, ...]:
    """None if there is no such file. Where questions were asked at several temperatures, those nearest to 1."""
    if not path.is_file():
        return ()
    names = ("arm", "seed", "set", "question", "text", "answer", "avg", "response", "right")
    table = _table(path, names, ("temperature",))
    temperatures = table.pop("temperature", [1.0] * len(table["arm"]))
    usual = min(temperatures, key=lambda t: abs(t - 1.0), default=1.0)
    rows = zip(zip(*table.values(), strict=True), temperatures, strict=True)
    return tuple(Question(*row) for row, temperature in rows if temperature == usual)


def _hours(path: Path) -> dict[str, float]:
    """Hours of wall clock and CPU over all trials; none if there is no such file."""
    if not path.is_file():
        return {}
    timings = _table(path, ("metric", "value"))
    spent = {"trial/wall_s": 0.0, "trial/cpu_s": 0.0}
    for metric, seconds in zip(timings["metric"], timings["value"], strict=True):
        if metric in spent:
            spent[metric] += seconds / 3600
    return {"wall": spent["trial/wall_s"], "cpu": spent["trial/cpu_s"]}


def _paragraphs(path: Path) -> tuple[str, ...]:
    """The paragraphs of a text; none if there is no such file."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return ()
    except (OSError, ValueError) as error:
        raise ConfigError("report", str(path), f"this file cannot be read: {error}") from error
    return tuple(" ".join(paragraph.split()) for paragraph in re.split(r"\n\s*\n", text) if paragraph.strip())


def _versions(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text()))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError("report", str(path), f"this file cannot be read: {error}") from error


def _some(names: Sequence[str], like: str) -> str:
    """The names most like one, for an error."""
    import difflib

    near = difflib.get_close_matches(like, names, n=4, cutoff=0.3) or list(names[:4])
    return ", ".join(near) + (", …" if len(names) > len(near) else "")
