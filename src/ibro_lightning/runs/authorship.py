"""Whether a file with one of a run's names is also the run's by its content: a resumed run removes only such files.

Rollouts carry the run's id, as its mark does. Evaluation files are the same in every run with the same settings, and
are recognised by their structure.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from lightning.pytorch.utilities import rank_zero_info

from ibro_lightning.guards.disk import free_name
from ibro_lightning.runs.marks import read_mark
from ibro_lightning.runs.model_folders import leaves, move_files
from ibro_lightning.runs.run_files import entry_of, is_unfinished

RUN_KEY = b"ibro_lightning.run"
"""The key of the run's id in a parquet file's metadata."""
_COLUMNS = {"iteration", "prompt_id", "response", "reward", "seed", "trained_on"}
_RESULTS = {"questions", "samples", "avg_at_k", "pass_at_k", "mean_length", "truncated"}
_STARTS = {".parquet.partial": b"PAR1", ".ckpt.partial": b"PK"}


def run_id(folder: Path) -> str:
    """The id of the run in ``folder``; "" if it has none."""
    return mark.run if (mark := read_mark(folder)) is not None else ""


def leave_to_others(folder: Path, paths: Iterable[str]) -> list[str]:
    """Of the files that a resumed run would remove, return the run's own, and move the others to ``foreign.1`` in the
    folder. Paths are relative to the folder, with slashes."""
    run = run_id(folder)
    own: list[str] = []
    others: list[str] = []
    for path in paths:
        is_ours = _may_be_ours(folder / path) if is_unfinished(path) else _is_ours(folder / path, run)
        (own if is_ours else others).append(path)
    if others:
        aside = free_name(folder / "foreign")
        move_files(folder, others, aside)
        more = f" and {len(others) - 1} more" if len(others) > 1 else ""
        rank_zero_info(f"{folder / others[0]}{more} is not of this run, which will write such files: moved to {aside}")
    return own


def _is_ours(path: Path, run: str) -> bool:
    if path.is_symlink():
        return False
    if path.is_dir() or "_curves" in path.parts:
        return True
    if path.name == "_manifest.json":
        return is_evaluation_manifest(path)
    try:
        if path.suffix == ".parquet":
            schema = pq.read_schema(path)
            return set(schema.names) >= _COLUMNS and (schema.metadata or {}).get(RUN_KEY, b"").decode() in ("", run)
        content = json.loads(path.read_bytes())
        return bool(content) and all(part.keys() >= _RESULTS for part in content.values())
    except (OSError, ValueError, AttributeError, pa.ArrowException):
        return False


def is_evaluation_manifest(path: Path) -> bool:
    try:
        return {"version", "fingerprint", "files"} <= json.loads(path.read_bytes()).keys()
    except (OSError, ValueError, AttributeError):
        return False


def _may_be_ours(path: Path) -> bool:
    """Whether an unfinished file may be ours, judging large files by their first bytes."""
    if path.is_symlink():
        return path.name == "last.ckpt.partial"
    start = next((start for suffix, start in _STARTS.items() if path.name.endswith(suffix)), b"")
    if not start or path.is_dir():
        return True
    try:
        with path.open("rb") as file:
            return start.startswith(file.read(len(start)))
    except OSError:
        return False


def own_in(folder: Path, name: str) -> list[str]:
    """Our files in a folder of samples whose path in the run's folder is ``name`` (``evaluations/validate``), the
    manifest last."""
    found = [] if folder.is_symlink() else leaves(folder)
    return sorted(
        (file for file in found if entry_of(f"{name}/{file}") is not None),
        key=lambda file: (file.startswith("_"), file),
    )


def set_aside(folder: Path, aside: Path, own: list[str]) -> None:
    """Move our files in a folder of samples to ``aside``; files of others stay. Of a link, only the link moves."""
    if folder.is_symlink() or set(own) == set(leaves(folder)):
        folder.rename(aside)
    else:
        move_files(folder, own, aside)


def signed(table: pa.Table, run: str) -> pa.Table:
    """``table`` with the run's id in its metadata."""
    metadata: dict[Any, Any] = {**(table.schema.metadata or {}), RUN_KEY: run.encode()}
    return table.replace_schema_metadata(metadata) if run else table
