"""Two evaluations of the same questions, compared question by question: ``python -m ibro_lightning compare A B``."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from ibro_lightning.errors import ConfigError
from ibro_lightning.functional import bootstrap_interval, sign_flip_p_value
from ibro_lightning.records import read_manifest
from ibro_lightning.run_folders import write_json


@dataclass(frozen=True)
class Comparison:
    """The second policy against the first on one set; accuracies are means over each question's samples."""

    questions: int
    first: float
    second: float
    difference: float
    """second − first"""
    low: float
    high: float
    """95 % bootstrap interval of the difference, over questions."""
    p_value: float
    """Paired sign-flip test, two-sided."""
    per_question: dict[str, tuple[float, float]]
    """``question id: (first, second)``"""


def compare(first: Mapping[str, float], second: Mapping[str, float]) -> Comparison:
    """Pair two policies' accuracies by question; questions that only one of them has are left out."""
    shared = [question for question in first if question in second]
    if not shared:
        raise ConfigError("compare", "no question in common", "name two evaluations of the same sets")
    a = torch.tensor([first[question] for question in shared], dtype=torch.float64)
    b = torch.tensor([second[question] for question in shared], dtype=torch.float64)
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
    """By set, and over all questions of all shared sets as ``all`` (if there are several).

    Args:
        first, second: what ``validate`` or ``test`` left: ``evaluations/validate.json``, or the folder
            ``evaluations/validate`` with the samples.
    """
    a, b = read_questions(first), read_questions(second)
    shared = [name for name in a if name in b]
    if not shared:
        raise ConfigError("compare", f"{first} has {sorted(a)}, {second} has {sorted(b)}", "they share no set")
    for name in shared:
        for question, (gold, _) in a[name].items():
            if question in b[name] and (other := b[name][question][0]) != gold:
                raise ConfigError(
                    "compare",
                    f"{name}/{question}",
                    f"the answer is {gold} in one and {other} in the other: two questions",
                )
    results = {name: compare(_accuracies(a, [name]), _accuracies(b, [name])) for name in shared}
    if len(shared) > 1:
        results["all"] = compare(_accuracies(a, shared), _accuracies(b, shared))
    return results


def read_questions(path: Path) -> dict[str, dict[str, tuple[str, float]]]:
    """``{set: {question id: (right answer as JSON, mean accuracy over its samples)}}`` of a finished evaluation.

    Raises:
        ConfigError: there is no evaluation, it is not finished, or its samples cannot be read.
    """
    folder, manifest = _opened(path)
    if not manifest.get("complete"):
        raise ConfigError("compare", str(path), "this evaluation is not finished: run the same command again")
    try:
        return {
            part.name: _read_set(part)
            for part in sorted(folder.iterdir())
            if part.is_dir() and not part.name.startswith("_")
        }
    except (OSError, ValueError, pa.ArrowException) as error:
        raise ConfigError("compare", str(folder), f"the samples there cannot be read: {error}") from error


def unlike(first: Path, second: Path) -> list[str]:
    """Which of sampling and rewards differ between two evaluations, and should not if the policies are compared."""
    a, b = (_opened(path)[1].get("fingerprint") or {} for path in (first, second))
    return [name for name in ("sampling", "rewards") if a.get(name) != b.get(name)]


def _opened(path: Path) -> tuple[Path, dict[str, Any]]:
    """The folder of an evaluation, and its manifest."""
    folder = path.with_suffix("") if path.suffix == ".json" else path
    manifest = read_manifest(folder)
    if manifest is None:
        raise ConfigError(
            "compare", str(path), "no evaluation there: name evaluations/validate.json of a run, its samples beside it"
        )
    return folder, manifest


def _read_set(folder: Path) -> dict[str, tuple[str, float]]:
    table = pq.read_table(folder, columns=["prompt_id", "answer", "reward_accuracy"])
    samples: dict[tuple[str, str], list[float]] = {}
    for question, gold, accuracy in zip(*(column.to_pylist() for column in table.columns), strict=True):
        samples.setdefault((question, gold), []).append(accuracy)
    return {question: (gold, sum(values) / len(values)) for (question, gold), values in samples.items()}


def _accuracies(sets: Mapping[str, Mapping[str, tuple[str, float]]], names: Sequence[str]) -> dict[str, float]:
    """Of several sets together; ids are unique within a set only."""
    one = len(names) == 1
    return {
        question if one else f"{name}/{question}": accuracy
        for name in names
        for question, (_, accuracy) in sets[name].items()
    }


def comparison_table(comparisons: Mapping[str, Comparison]) -> str:
    """One line per set; percentages."""
    lines = [f"{'set':16} {'questions':>9}  {'first':>7}  {'second':>7}  {'difference':22}  {'p':>6}"]
    for name, c in comparisons.items():
        difference = f"{100 * c.difference:+.1f} [{100 * c.low:+.1f}, {100 * c.high:+.1f}]"
        lines.append(
            f"{name:16} {c.questions:>9}  {100 * c.first:>5.1f} %  {100 * c.second:>5.1f} %  {difference:22}  "
            f"{c.p_value:>6.4f}"
        )
    return "\n".join(lines)


def main(argv: Sequence[str]) -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m ibro_lightning compare", description=__doc__)
    parser.add_argument("first", type=Path, help="evaluations/validate.json of the first policy's run")
    parser.add_argument("second", type=Path, help="the same of the second")
    parser.add_argument("--json", type=Path, help="write the comparison there, with every question's accuracies")
    arguments = parser.parse_args(argv)
    comparisons = compare_evaluations(arguments.first, arguments.second)
    print(comparison_table(comparisons))
    if differ := unlike(arguments.first, arguments.second):
        print(f"note: the two evaluations differ in {', '.join(differ)}, too, not in the policy alone")
    if arguments.json:
        write_json(arguments.json, {name: asdict(comparison) for name, comparison in comparisons.items()})
        print(f"\nper question: {arguments.json}")
