"""Two evaluations of the same questions, compared question by question: ``python -m ibro_lightning compare A B``."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ibro_lightning.errors import ConfigError
from ibro_lightning.guards.disk import PARTIAL, free_name, write_json
from ibro_lightning.resampling import bootstrap_interval, sign_flip_p_value
from ibro_lightning.runs.arguments import OneLineArguments
from ibro_lightning.runs.samples_manifest import read_manifest


@dataclass(frozen=True)
class Comparison:
    """The second policy compared with the first on one set; a question's accuracy is the mean over its samples."""

    questions: int
    first: float
    second: float
    difference: float
    """second − first"""
    low: float
    high: float
    """95 % bootstrap confidence interval of the difference, over questions."""
    p_value: float
    """Of a paired, two-sided sign-flip test."""
    per_question: dict[str, tuple[float, float]]
    """``question id: (first, second)``"""


def compare(first: Mapping[str, float], second: Mapping[str, float]) -> Comparison:
    """Compare two policies' accuracies, paired by question; raises ConfigError if they share none."""
    shared = [question for question in first if question in second]
    if not shared:
        raise ConfigError("compare", "no question in common", "name two evaluations of the same sets")
    a, b = (np.array([of[question] for question in shared], dtype=np.float64) for of in (first, second))
    low, high = bootstrap_interval(b - a)
    return Comparison(
        questions=len(shared),
        first=a.mean().item(),
        second=b.mean().item(),
        difference=(b - a).mean().item(),
        low=low,
        high=high,
        p_value=sign_flip_p_value(b - a),
        per_question={question: (first[question], second[question]) for question in shared},
    )


def compare_evaluations(first: Path, second: Path) -> dict[str, Comparison]:
    """Comparisons by set, and as ``all`` over the questions of all shared sets if there are several.

    Both are results of ``validate`` or ``test``: ``evaluations/validate.json``, or the folder of its samples.
    """
    a, b = read_questions(first), read_questions(second)
    shared = [name for name in a if name in b]
    if not shared:
        raise ConfigError("compare", f"{first} has {sorted(a)}, {second} has {sorted(b)}", "they share no set")
    for name in shared:
        for question, (gold, _) in a[name].items():
            if question in b[name] and (other := b[name][question][0]) != gold:
                remedy = f"the answer is {gold} in one and {other} in the other: two questions"
                raise ConfigError("compare", f"{name}/{question}", remedy)
    results = {name: compare(_accuracies(a, [name]), _accuracies(b, [name])) for name in shared}
    if len(shared) > 1:
        results["all"] = compare(_accuracies(a, shared), _accuracies(b, shared))
    return results


def read_questions(path: Path) -> dict[str, dict[str, tuple[str, float]]]:
    """``{set: {question id: (right answer as JSON, mean accuracy over its samples)}}`` of a finished evaluation."""
    folder, manifest = _open(path)
    if not manifest.get("complete"):
        raise ConfigError("compare", str(path), "this evaluation is not finished: run the same command again")
    try:
        sets = [part for part in sorted(folder.iterdir()) if part.is_dir() and not part.name.startswith("_")]
        return {part.name: _read_set(part) for part in sets}
    except (OSError, ValueError, pa.ArrowException) as error:
        raise ConfigError("compare", str(folder), f"the samples there cannot be read: {error}") from error


def unlike(first: Path, second: Path) -> list[str]:
    """Which of ``sampling`` and ``rewards`` differ between two evaluations, which confounds their comparison."""
    a, b = (_open(path)[1].get("fingerprint") or {} for path in (first, second))
    return [name for name in ("sampling", "rewards") if a.get(name) != b.get(name)]


def _open(path: Path) -> tuple[Path, dict[str, Any]]:
    """``(folder, manifest)`` of an evaluation."""
    folder = path.with_suffix("") if path.suffix == ".json" else path
    manifest = read_manifest(folder)
    if manifest is None:
        remedy = "no evaluation there: name evaluations/validate.json of a run, its samples beside it"
        raise ConfigError("compare", str(path), remedy)
    return folder, manifest


def _read_set(folder: Path) -> dict[str, tuple[str, float]]:
    table = pq.read_table(folder, columns=["prompt_id", "answer", "reward_accuracy"])
    samples: dict[tuple[str, str], list[float]] = {}
    for question, gold, accuracy in zip(*(column.to_pylist() for column in table.columns), strict=True):
        samples.setdefault((question, gold), []).append(accuracy)
    return {question: (gold, sum(values) / len(values)) for (question, gold), values in samples.items()}


def _accuracies(sets: Mapping[str, Mapping[str, tuple[str, float]]], names: Sequence[str]) -> dict[str, float]:
    """``{question: accuracy}`` over several sets; question ids are unique only within a set."""
    single = len(names) == 1
    return {
        question if single else f"{name}/{question}": accuracy
        for name in names
        for question, (_, accuracy) in sets[name].items()
    }


def comparison_table(comparisons: Mapping[str, Comparison]) -> str:
    """A table with one line per set, in percent."""
    lines = [f"{'set':16} {'questions':>9}  {'first':>7}  {'second':>7}  {'difference':22}  {'p':>6}"]
    for name, c in comparisons.items():
        difference = f"{100 * c.difference:+.1f} [{100 * c.low:+.1f}, {100 * c.high:+.1f}]"
        accuracies = f"{100 * c.first:>5.1f} %  {100 * c.second:>5.1f} %"
        lines.append(f"{name:16} {c.questions:>9}  {accuracies}  {difference:22}  {c.p_value:>6.4f}")
    return "\n".join(lines)


def check_free(path: Path, overwrite: bool) -> None:
    """Raise :class:`ConfigError` unless ``path`` is free, or an earlier comparison to replace."""
    if path.is_dir() or any(folder.exists() and not folder.is_dir() for folder in path.parents):
        raise ConfigError("compare --json", str(path), "no file can be there: write another name")
    if os.path.lexists(path.with_name(path.name + PARTIAL)):
        raise ConfigError("compare --json", str(path), f"{path.name + PARTIAL} is in the way: write another name")
    if os.path.lexists(path) and not overwrite and not _is_comparison(path):
        raise ConfigError("compare --json", str(path), "exists: --overwrite moves it aside, or write another name")


def _is_comparison(path: Path) -> bool:
    try:
        content = json.loads(path.read_text())
        names = {field.name for field in fields(Comparison)}
        return bool(content) and all(set(entry) == names for entry in content.values())
    except (OSError, ValueError, AttributeError, TypeError):
        return False


def main(argv: Sequence[str]) -> None:
    """Run ``python -m ibro_lightning compare``."""
    parser = OneLineArguments(prog="python -m ibro_lightning compare", description=__doc__)
    parser.add_argument("first", type=Path, help="evaluations/validate.json of the first policy's run")
    parser.add_argument("second", type=Path, help="the same of the second")
    parser.add_argument("--json", type=Path, help="write the comparison there, with every question's accuracies")
    parser.add_argument("--overwrite", action="store_true", help="move whatever file is there aside")
    arguments = parser.parse_args(argv)
    if arguments.json:
        check_free(arguments.json, arguments.overwrite)
    comparisons = compare_evaluations(arguments.first, arguments.second)
    print(comparison_table(comparisons))
    if differ := unlike(arguments.first, arguments.second):
        print(f"note: the two evaluations differ in {', '.join(differ)}, too, not in the policy alone")
    if arguments.json:
        if os.path.lexists(arguments.json):
            aside = free_name(arguments.json)
            arguments.json.rename(aside)
            print(f"\nwhat was in {arguments.json} is in {aside}")
        write_json(arguments.json, {name: asdict(comparison) for name, comparison in comparisons.items()})
        print(f"\nper question: {arguments.json}")
