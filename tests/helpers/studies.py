"""Results folders of invented studies, as ``study`` writes them; what the arms do is known."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml

Row = tuple[str, int, int, str, float]
"""``(arm, seed, iteration, metric, value)``"""

PLAN: Mapping[str, Any] = {
    "question": "Does IB help a small policy on number paths?",
    "metric": "val/number_path/avg@16",
    "comparisons": [["none", "ib"], ["none", "naive"]],
    "test": "sign_flip",
    "level": 0.05,
    "difference_that_matters": 0.02,
    "answer": "IB above none by 2 points or more; a difference below that would change our mind.",
    "chosen_by": "unregularised runs alone, on training problems, seeds 101 to 103",
    "paired_sd": 0.025,
}
ARMS: Mapping[str, Any] = {
    "none": {"settings": {}, "label": "DAPO"},
    "ib": {"settings": {"model.regularizer.coef": 0.005}, "label": "DAPO + IB"},
    "naive": {"settings": {"model.regularizer.coef": 0.001}, "label": "DAPO + naive"},
}


def study_file(seeds: Sequence[int], arms: Mapping[str, Any] = ARMS, **plan: Any) -> dict[str, Any]:
    """The content of a study file."""
    return {
        "name": "invented",
        "plan": {**PLAN, **plan},
        "recipe": "quickstart.yaml",
        "settings": {"trainer.max_epochs": 100},
        "arms": {name: dict(arm) for name, arm in arms.items()},
        "seeds": [*seeds],
        "temperatures": [0.6, 0.8, 1.0, 1.2, 1.4],
    }


def write_results(
    folder: Path,
    rows: Sequence[Row],
    study: Mapping[str, Any],
    *,
    failed: Mapping[tuple[str, int], str] = {},
    running: Sequence[tuple[str, int]] = (),
    questions: Sequence[Mapping[str, Any]] = (),
) -> Path:
    """Write a results folder.

    Args:
        rows: the points; trials are those that occur in them, finished unless they are named below.
        failed: ``{(arm, seed): reason}``
        running: trials that have not ended.
        questions: rows of ``questions.parquet``, without ``trial``.
    """
    folder.mkdir(parents=True, exist_ok=True)
    order = {arm: number for number, arm in enumerate(study["arms"])}
    rows = sorted(rows, key=lambda row: (order[row[0]], row[1], row[3], row[2]))
    write_points(folder / "results.parquet", rows)
    trials_with_points = dict.fromkeys((arm, seed) for arm, seed, *_ in rows)
    spent = {"trial/wall_s": 900.0, "trial/cpu_s": 450.0}
    write_points(
        folder / "timings.parquet",
        [(*trial, 0, metric, seconds) for trial in trials_with_points for metric, seconds in spent.items()],
    )
    names = dict.fromkeys([*((arm, seed) for arm, seed, *_ in rows), *failed, *running])
    trials = [
        {
            "trial": f"{arm}/seed_{seed}",
            "arm": arm,
            "seed": seed,
            "state": "failed" if (arm, seed) in failed else "running" if (arm, seed) in running else "finished",
            "attempts": 2 if (arm, seed) in failed else 1,
            "error": failed.get((arm, seed), ""),
        }
        for arm, seed in names
    ]
    pq.write_table(pa.Table.from_pylist(trials), folder / "trials.parquet")
    if questions:
        complete = [{"trial": f"{row['arm']}/seed_{row['seed']}", **row} for row in questions]
        pq.write_table(pa.Table.from_pylist(complete), folder / "questions.parquet")
    (folder / "study.yaml").write_text(yaml.safe_dump(dict(study), sort_keys=False))
    versions = {"python": "3.11.2", "packages": {"torch": "2.11.0", "scipy": "1.17.1"}, "commit": "0" * 40}
    (folder / "versions.json").write_text(json.dumps(versions))
    return folder


def write_points(path: Path, rows: Sequence[Row]) -> None:
    """A tidy parquet file of points."""
    arm, seed, iteration, metric, value = zip(*rows, strict=True)
    trials = [f"{name}/seed_{number}" for name, number in zip(arm, seed, strict=True)]
    columns = {
        "trial": pa.array(trials),
        "arm": pa.array(arm),
        "seed": pa.array(seed, pa.int64()),
        "iteration": pa.array(iteration, pa.int64()),
        "metric": pa.array(metric),
        "value": pa.array(value, pa.float64()),
    }
    pq.write_table(pa.table(columns), path)


def final_rows(values: Mapping[str, Sequence[float]], metric: str = str(PLAN["metric"])) -> list[Row]:
    """``{arm: value per seed}`` at iteration 100, seeds from 1; and 0.3 before training."""
    return [
        (arm, seed, iteration, metric, value)
        for arm, of_arm in values.items()
        for seed, final in enumerate(of_arm, start=1)
        for iteration, value in ((0, 0.3), (100, final))
    ]


def small_study(folder: Path) -> Path:
    """Two arms, two seeds, one metric: quick to report on."""
    rows = final_rows({"none": [0.8, 0.7], "ib": [0.9, 0.75]})
    arms = {name: ARMS[name] for name in ("none", "ib")}
    return write_results(folder, rows, study_file([1, 2], arms, comparisons=[["none", "ib"]]))


ENDS = {"none": 0.84, "ib": 0.865, "naive": 0.85}
"""Where the accuracies of :func:`invented_study` end on average."""


def invented_study(folder: Path, seeds: int = 8, *, failing: bool = False, ends: Mapping[str, float] = ENDS) -> Path:
    """A whole results folder: curves of 100 iterations, five temperatures, questions; arms share the noise of a seed.

    Args:
        failing: the last seed of the last arm has failed, and the one before has not ended.
    """
    random = np.random.default_rng(0)
    rows: list[Row] = []
    shared = random.normal(scale=0.02, size=seeds)
    last, chosen = [*ARMS][-1], [*ends]
    for arm, end in ends.items():
        for seed in range(1, seeds + 1):
            accuracy = end + shared[seed - 1] + random.normal(scale=0.01)
            rows += _curves(arm, seed, accuracy, chosen.index(arm))
            if failing and (arm, seed) in ((last, seeds), (last, seeds - 1)):
                rows = [row for row in rows if row[:2] != (arm, seed) or row[2] <= 40]
    failed = {(last, seeds): "WeightSyncError: after a sync the engine's weights differ from the policy's"}
    return write_results(
        folder,
        rows,
        study_file(range(1, seeds + 1), {name: ARMS[name] for name in ends}),
        failed=failed if failing else {},
        running=[(last, seeds - 1)] if failing else [],
        questions=_questions(ends, seeds),
    )


def _curves(arm: str, seed: int, accuracy: float, number: int) -> list[Row]:
    random = np.random.default_rng([seed, number])
    rows: list[Row] = []
    for iteration in range(0, 101, 5):
        done = 1 - np.exp(-iteration / 25)
        policy = {
            "policy/entropy": 0.25 - (0.19 - 0.03 * number) * done + 0.005 * random.normal(),
            "regularizer/gradient_share": 0.05 * number + 0.01 * random.random(),
            "ib/mean_advantage_times_mean_entropy": 0.002 * random.normal(),
            "ib/cov_advantage_entropy": -0.01 * done + 0.002 * random.normal(),
        }
        evaluation = {
            "val/number_path/avg@16": 0.3 + (accuracy - 0.3) * done,
            "val/number_path/pass@4": 0.5 + (accuracy - 0.46) * done,
            "val/number_path/pass@16": 0.75 + (accuracy - 0.68) * done,
            "val/number_path/length": 22 + 2 * done,
            "val/sums/avg@16": 0.2 + (accuracy - 0.4) * done,
        }
        chosen = {**(policy if iteration else {}), **(evaluation if iteration % 20 == 0 else {})}
        rows += [(arm, seed, iteration, metric, float(value)) for metric, value in chosen.items()]
    for temperature in (0.6, 0.8, 1.0, 1.2, 1.4):
        entropy = (0.06 + 0.03 * number) * temperature**3 * (1 + 0.02 * random.normal())
        here = {"avg@16": accuracy + 0.05 * (1 - temperature), "entropy": entropy}
        rows += [
            (arm, seed, 100, f"at_temperature/{temperature}/number_path/{name}", value) for name, value in here.items()
        ]
    return rows


def _questions(arms: Mapping[str, float], seeds: int) -> list[dict[str, Any]]:
    return [
        {
            "arm": arm,
            "seed": seed,
            "set": "number_path",
            "question": f"q{number}",
            "text": f"{number}>{3 * number + 7}:",
            "answer": f'{{"start": {number}, "target": {3 * number + 7}}}',
            "temperature": 1.0,
            "avg": float(np.clip(0.5 + 0.1 * place * (number - 4), 0, 1)),
            "response": f"*3={3 * number}+7={3 * number + 7}",
            "right": number >= 4,
        }
        for place, arm in enumerate(arms)
        for seed in range(1, seeds + 1)
        for number in range(9)
    ]
