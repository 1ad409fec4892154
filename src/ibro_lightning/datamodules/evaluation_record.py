"""An evaluation on disk: all its samples, batch by batch, so that one that was killed goes on where it was."""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import json
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from ibro_lightning.records import MANIFEST, read_groups, read_manifest, write_parquet
from ibro_lightning.run_folders import free_name, write_json
from ibro_lightning.types import Group, Prompt, Rollout
from ibro_lightning.version import __version__


class EvaluationRecord:
    """``FOLDER/SET/batch_0000.parquet`` and a manifest that says of what policy, prompts and settings they are.

    An unfinished record of the very same evaluation is continued. Any other evaluation that lies there is kept: it is
    moved aside with its results (``FOLDER.1``).

    Args:
        folder: e.g. ``evaluations/validate``.
        fingerprint: everything that determines the samples and their verdicts (see :func:`fingerprint`); None begins
            anew, over whatever is there: an evaluation within training, whose weights are of this moment.
    """

    def __init__(self, folder: Path, fingerprint: Mapping[str, str] | None) -> None:
        self.folder = folder
        manifest = read_manifest(folder) or {}
        self.continues = fingerprint is not None and manifest.get("fingerprint") == fingerprint
        self.continues &= manifest.get("complete") is False
        if self.continues:
            return
        if fingerprint is None:
            shutil.rmtree(folder, ignore_errors=True)
        _set_aside(folder)
        write_json(
            folder / MANIFEST,
            {"version": __version__, "fingerprint": fingerprint and dict(fingerprint), "complete": False},
        )

    def read(
        self, name: str, batch: int, prompts: Sequence[Prompt], seeds: Sequence[Sequence[int]]
    ) -> list[Group] | None:
        """The responses of a batch that is done, or None."""
        return read_groups(self._path(name, batch), prompts, seeds) if self.continues else None

    def write(self, name: str, batch: int, rollout: Rollout) -> None:
        write_parquet(self._path(name, batch), rollout, tokens=True)

    def _path(self, name: str, batch: int) -> Path:
        return self.folder / name / f"batch_{batch:04d}.parquet"


def fingerprint(weights: Iterable[tuple[str, Tensor]], **settings: Any) -> dict[str, str]:
    """A digest of the weights (all bytes of all of them) and of each setting."""
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in weights:
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    said = {name: json.dumps(describe(value), sort_keys=True) for name, value in settings.items()}
    return {
        "weights": digest.hexdigest(),
        **{name: hashlib.blake2b(text.encode(), digest_size=16).hexdigest() for name, text in said.items()},
    }


def describe(value: Any, depth: int = 0) -> Any:
    """What ``value`` is, as JSON: plain data as it stands, an object as its class, its public attributes and, unless it
    is one of ours, the source text of its class (a verifier that was mended must not be given its old verdicts)."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Mapping):
        return {str(key): describe(item, depth + 1) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        items = [describe(item, depth + 1) for item in value]
        return items if isinstance(value, list | tuple) else sorted(items, key=str)
    kind = value if isinstance(value, type) else type(value)
    said: dict[str, Any] = {"class": f"{kind.__module__}.{kind.__qualname__}"}
    if not kind.__module__.startswith("ibro_lightning."):
        with contextlib.suppress(OSError, TypeError):
            said["source"] = inspect.getsource(kind)
    if depth < 6 and hasattr(value, "__dict__"):
        public = {name: item for name, item in vars(value).items() if not name.startswith("_") and not callable(item)}
        said |= {name: describe(item, depth + 1) for name, item in public.items()}
    return said


def _set_aside(folder: Path) -> None:
    """Keep an earlier evaluation under another name: its samples, and the results in ``FOLDER.json``."""
    if not folder.exists():
        return
    aside = free_name(folder)
    folder.rename(aside)
    results = folder.with_name(folder.name + ".json")
    if results.exists():
        results.rename(aside.with_name(aside.name + ".json"))
    rank_zero_info(f"an earlier evaluation was in {folder}: moved to {aside}")
