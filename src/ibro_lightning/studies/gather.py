"""What a finished trial leaves for the results: curves, timings, and its last evaluation question by question."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from ibro_lightning.guards.disk import write_json, written_atomically
from ibro_lightning.studies.curves import read_curves
from ibro_lightning.studies.study_file import Study, Trial

CURVES = pa.schema(
    [
        *(("trial", pa.string()), ("arm", pa.string()), ("seed", pa.int64())),
        *(("iteration", pa.int64()), ("metric", pa.string()), ("value", pa.float64())),
    ]
)
QUESTIONS = pa.schema(
    [
        *(("trial", pa.string()), ("arm", pa.string()), ("seed", pa.int64()), ("set", pa.string())),
        *(("question", pa.string()), ("text", pa.string()), ("answer", pa.string())),
        *(("avg", pa.float64()), ("response", pa.string()), ("right", pa.bool_())),
    ]
)
TIMINGS = ("time/", "time_share/", "tokens_per_second/")
"""Beginnings of the names of curves that no two runs have in common."""
Row = tuple[str, int, float]
"""Metric, iteration, value."""


def gather(study: Study, trial: Trial, folder: Path, spent: Mapping[str, float]) -> None:
    """Write a trial's part of the results beside its folder; ``trial.json`` comes last and says that it is complete.

    Args:
        folder: the training run's.
        spent: what the trial took: time and disk.
    """
    curves = read_curves(folder)
    last = max((iteration for _, iteration, _ in curves), default=0)
    evaluated = max((iteration for metric, iteration, _ in curves if metric.startswith("val/")), default=0)
    kept = list(thinned(curves, study.curves, study.every))
    kept += [(metric, evaluated, value) for metric, value in at_temperatures(study, folder, evaluated)]
    timings = [
        (metric, last, float(np.mean([value for name, _, value in curves if name == metric])))
        for metric in sorted({name for name, _, _ in curves if name.startswith(TIMINGS)})
    ]
    out = stored_folder(folder)
    write_table(out / "results.parquet", curves_table(trial, sorted(set(kept))))
    timings += [(name, last, value) for name, value in spent.items()]
    write_table(out / "timings.parquet", curves_table(trial, timings))
    write_table(out / "questions.parquet", questions_table(trial, folder, evaluated))
    config = (folder / "config.yaml").read_text()
    write_json(out / "trial.json", {"digest": trial.digest, "policy": _digest(folder / "model"), "config": config})


def stored_folder(folder: Path) -> Path:
    return folder.with_name(folder.name + ".results")


def is_stored(folder: Path, trial: Trial) -> bool:
    """Whether a trial's results are complete, and those of the trial as it is now."""
    try:
        return json.loads((stored_folder(folder) / "trial.json").read_text())["digest"] == trial.digest
    except (OSError, ValueError, KeyError):
        return False


def thinned(curves: Iterable[Row], kept: Sequence[str], every: int) -> Iterable[Row]:
    """Evaluations as they are, and the means of training curves over blocks of iterations, at the end of each block."""
    curves = list(curves)
    last = max((iteration for _, iteration, _ in curves), default=0)
    blocks: dict[tuple[str, int], list[float]] = {}
    for metric, iteration, value in curves:
        if metric.startswith(("val/", "test/")) and metric.startswith(tuple(kept)):
            yield metric, iteration, value
        elif metric.startswith(tuple(kept)):
            blocks.setdefault((metric, min(-(-iteration // every) * every, last)), []).append(value)
    for (metric, iteration), values in blocks.items():
        yield metric, iteration, float(np.mean(values))


def set_at_temperature(name: str, number: int) -> str:
    """The name of an evaluation set at the temperature of that number."""
    return f"{name}-t{number}"


def temperature_folder(folder: Path) -> Path:
    return folder.with_name(folder.name + ".temperatures")


def at_temperatures(study: Study, folder: Path, last: int) -> Iterable[tuple[str, float]]:
    """Accuracy and entropy of the trained policy at the study's temperatures and, unless it is one of them, at that of
    its last evaluation.

    The entropy, in nats per token, is the mean of −log π over the tokens of its samples: without bias for the
    distribution that they come from, which is that of the temperature.
    """
    own = folder / "evaluations" / f"iteration_{last:06d}.json"
    sets = yaml.safe_load((folder / "config.yaml").read_text())["data"]["init_args"]["eval_sets"]
    places = {name: (name, given["sampling"]["temperature"]) for name, given in sets.items()}
    yield from _accuracies(own, {name: p for name, p in places.items() if p[1] not in study.temperatures})
    if study.temperatures:
        evaluation = temperature_folder(folder) / "evaluations" / "validate.json"
        numbered = list(enumerate(study.temperatures))
        yield from _accuracies(
            evaluation, {set_at_temperature(name, n): (name, t) for name in sets for n, t in numbered}
        )


def _accuracies(evaluation: Path, places: Mapping[str, tuple[str, float]]) -> Iterable[tuple[str, float]]:
    """Of the sets of an evaluation; ``places`` are their plain names and temperatures."""
    results = json.loads(evaluation.read_text()) if evaluation.exists() else {}
    for name in results.keys() & places.keys():
        result, (plain, temperature) = results[name], places[name]
        at = f"at_temperature/{temperature:g}/{plain}"
        yield f"{at}/avg@{result['samples']}", result["avg_at_k"]["mean"]
        table = read_samples(evaluation.with_suffix("") / name, ["mean_logp", "response_tokens"])
        logp, tokens = (column.to_numpy() for column in table.columns)
        yield f"{at}/entropy", float(-(logp * tokens).sum() / tokens.sum())


def questions_table(trial: Trial, folder: Path, iteration: int) -> pa.Table:
    """The last evaluation: each question's accuracy, and its first sample."""
    columns = ["prompt_id", "prompt", "answer", "response", "reward_accuracy"]
    first: dict[tuple[str, str], dict[str, Any]] = {}
    scores: dict[tuple[str, str], list[float]] = {}
    for part in sorted((folder / "evaluations" / f"iteration_{iteration:06d}").glob("[!_]*")):
        for sample in read_samples(part, columns).to_pylist():
            key = (part.name, sample["prompt_id"])
            first.setdefault(key, sample)
            scores.setdefault(key, []).append(sample["reward_accuracy"])
    same = {"trial": trial.name, "arm": trial.arm, "seed": trial.seed}
    content = [
        {
            **same,
            "set": name,
            "question": question,
            "text": sample["prompt"],
            "answer": sample["answer"],
            "avg": float(np.mean(scores[name, question])),
            "response": sample["response"],
            "right": sample["reward_accuracy"] > 0.5,
        }
        for (name, question), sample in sorted(first.items())
    ]
    return pa.Table.from_pylist(content, schema=QUESTIONS)


def read_samples(folder: Path, columns: list[str]) -> pa.Table:
    """Columns of an evaluation's samples."""
    parts = [pq.read_table(path, columns=columns) for path in sorted(folder.glob("*.parquet"))]
    return pa.concat_tables(parts)


def curves_table(trial: Trial, rows: Sequence[Row]) -> pa.Table:
    """The tidy table of one trial's values."""
    metrics, iterations, values = zip(*rows, strict=True) if rows else ((), (), ())
    same: dict[str, list[Any]] = {"trial": [trial.name], "arm": [trial.arm], "seed": [trial.seed]}
    columns: dict[str, Any] = {name: value * len(rows) for name, value in same.items()}
    return pa.table({**columns, "iteration": iterations, "metric": metrics, "value": values}, schema=CURVES)


def write_table(path: Path, table: pa.Table) -> None:
    with written_atomically(path) as partial:
        pq.write_table(table, partial, compression="zstd")


def _digest(model: Path) -> str:
    """Of a policy's weights: trials of one seed are paired only as far as they start from the same ones."""
    digest = hashlib.sha256()
    for path in sorted(model.glob("*.safetensors")):
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:16]
