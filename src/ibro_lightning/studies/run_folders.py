"""Ordinary runs as a study without a plan: runs of ``fit`` whose settings are equal but for the seed are one arm."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from ibro_lightning.errors import ConfigError
from ibro_lightning.studies.curves import read_curves
from ibro_lightning.studies.plan import ReportedPlan, ReportedStudy
from ibro_lightning.studies.results import FINISHED, Points, Question, Results, Trial

SEED = "seed_everything"
IRRELEVANT = (
    *(
        SEED,
        "trainer.default_root_dir",
        "trainer.logger",
        "ckpt_path",
        "config",
        "num_threads",
        "progress",
        "heartbeat",
    ),
    *("samples", "rollout_log", "checkpoint", "export", "run_lock", "metrics_log"),
)
"""Settings that do not change what is learned."""
Flat = dict[str, Any]
"""``{dotted key: value}``"""


def read_runs(folders: Sequence[Path], metric: str = "") -> Results:
    """The results of several runs.

    Args:
        folders: of the runs, each with a ``config.yaml`` and curves.
        metric: the outcome to compare; by default the first evaluation set's avg@k.

    Raises:
        ConfigError: a folder is no run's, two runs have the same settings and seed, or no run has the metric.
    """
    settings = {folder: _settings(folder) for folder in folders}
    arms = _arms(settings)
    points: list[tuple[str, int, int, str, float]] = []
    trials, questions, seen = [], [], dict[tuple[str, int], Path]()
    for folder, flat in settings.items():
        arm, seed = arms[folder], _seed(flat, folder)
        if (other := seen.setdefault((arm, seed), folder)) != folder:
            raise ConfigError("report", str(folder), f"it has the settings and the seed of {other}: name one of them")
        points += [(arm, seed, iteration, name, value) for name, iteration, value in read_curves(folder)]
        finished, why = _is_finished(folder, flat)
        trials.append(Trial(arm, seed, FINISHED if finished else "unfinished", error=why))
        questions += list(_questions(folder, arm, seed))
    names = ("arm", "seed", "iteration", "metric", "value")
    columns = Points.of(pa.table(dict(zip(names, map(pa.array, zip(*points, strict=True)), strict=True))))
    plan = ReportedPlan(metric=metric or _outcome(columns.metric_names), comparisons=_all_with_first(trials))
    labels = {trial.arm: trial.arm for trial in trials}
    study = ReportedStudy("runs", plan, labels, tuple(sorted({trial.seed for trial in trials})), {})
    results = Results(folders[0], study, columns, tuple(trials), tuple(questions), planned=False)
    results.curves(plan.metric)  # refuses a metric that no run has
    return results


def _settings(folder: Path) -> Flat:
    path = folder / "config.yaml"
    try:
        content = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        remedy = f"a run's settings are not there ({type(error).__name__}): name folders that `fit` has written"
        raise ConfigError("report", str(path), remedy) from error
    if not isinstance(content, Mapping):
        raise ConfigError("report", str(path), "this is no run's config.yaml: name folders that `fit` has written")
    return dict(_flatten(content))


def _flatten(content: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in content.items():
        if isinstance(value, Mapping) and value:
            yield from _flatten(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _seed(flat: Flat, folder: Path) -> int:
    seed = flat.get(SEED)
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise ConfigError("report", str(folder), f"its {SEED} is {seed!r}: only runs with a number can be paired")
    return seed


def _arms(settings: Mapping[Path, Flat]) -> dict[Path, str]:
    """What to call the arm of each run: the settings in which it differs from the others."""
    relevant = {folder: _relevant(flat) for folder, flat in settings.items()}
    keys = sorted({key for flat in relevant.values() for key in flat})
    differing = [key for key in keys if len({json.dumps(flat.get(key)) for flat in relevant.values()}) > 1]
    names = {}
    for folder, flat in relevant.items():
        parts = [f"{_short_key(key, differing)}={_short_value(flat[key])}" for key in differing if key in flat]
        names[folder] = ", ".join(parts) or "all runs"
    return names


def _relevant(flat: Flat) -> Flat:
    """Without what does not change what is learned. A base policy of its own per seed (``…/seed_3/model``) is the same
    setting for all seeds."""
    seed = flat.get(SEED)
    own = re.compile(rf"(?<=[_/-]){seed}(?=[_/.-]|$)|(?<=seed){seed}(?=\D|$)")
    return {
        key: own.sub("SEED", value) if isinstance(value, str) else value
        for key, value in flat.items()
        if not any(key == name or key.startswith(name + ".") for name in IRRELEVANT)
    }


def _short_key(key: str, among: Sequence[str]) -> str:
    """The fewest last components of a key that no other key ends with; ``class_path`` and ``init_args`` say nothing."""
    parts = [part for part in key.split(".") if part not in ("class_path", "init_args")]
    others = [[part for part in other.split(".") if part not in ("class_path", "init_args")] for other in among]
    for length in range(1, len(parts) + 1):
        if sum(other[-length:] == parts[-length:] for other in others) == 1:
            return ".".join(parts[-length:])
    return ".".join(parts)


def _short_value(value: Any) -> str:
    text = value.rsplit(".", 1)[-1] if isinstance(value, str) and "/" not in value else json.dumps(value)
    return text if len(text) <= 40 else text[:39] + "…"


def _is_finished(folder: Path, flat: Flat) -> tuple[bool, str]:
    """Whether a run has reached its last iteration, and if not, why that is thought."""
    path, planned = folder / "summary.json", flat.get("trainer.max_epochs")
    if not path.is_file():
        return False, "it has no summary.json: it has not ended"
    try:
        done = json.loads(path.read_text())["iterations"]
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise ConfigError("report", str(path), f"this summary cannot be read: {error}") from error
    if isinstance(planned, int) and done < planned:
        return False, f"it has ended after {done} of {planned} iterations"
    return True, ""


def _questions(folder: Path, arm: str, seed: int) -> Iterator[Question]:
    """Of the last evaluation during training, set by set."""
    finished = sorted(path.with_suffix("") for path in folder.glob("evaluations/iteration_*.json"))
    for part in sorted(finished[-1].iterdir()) if finished and finished[-1].is_dir() else ():
        if not part.is_dir() or part.name.startswith("_"):
            continue
        names = ["prompt_id", "prompt", "answer", "response", "reward_accuracy"]
        try:
            rows = [
                row for path in sorted(part.glob("*.parquet")) for row in pq.read_table(path, columns=names).to_pylist()
            ]
        except (OSError, ValueError, pa.ArrowException) as error:
            raise ConfigError("report", str(part), f"the samples there cannot be read: {error}") from error
        samples: dict[str, list[dict[str, Any]]] = {}
        for row in rows:
            samples.setdefault(row["prompt_id"], []).append(row)
        for question, given in samples.items():
            first, right = given[0], [float(row["reward_accuracy"]) for row in given]
            about = (first["prompt"], first["answer"], sum(right) / len(right))
            yield Question(arm, seed, part.name, question, *about, first["response"], right[0] > 0.5)


def _outcome(metrics: Sequence[str]) -> str:
    names = sorted({name for name in metrics if re.fullmatch(r"val/.+/avg@\d+", name)})
    return names[0] if names else "val/accuracy"


def _all_with_first(trials: Sequence[Trial]) -> tuple[tuple[str, str], ...]:
    arms = list(dict.fromkeys(trial.arm for trial in trials))
    return tuple((arms[0], arm) for arm in arms[1:])
