"""Evaluation samples on disk, written batch by batch, so that an interrupted evaluation can resume."""

from __future__ import annotations

import hashlib
import inspect
import json
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from enum import Enum
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from ibro_lightning import __version__
from ibro_lightning.batches import Rollout
from ibro_lightning.guards.disk import free_name, write_json
from ibro_lightning.rewards import Reward
from ibro_lightning.runs.authorship import own_in, set_aside
from ibro_lightning.runs.model_folders import remove
from ibro_lightning.runs.parquet import read_groups, write_parquet
from ibro_lightning.runs.samples_manifest import MANIFEST, read_manifest
from ibro_lightning.types import Group, Prompt

_NAME = "evaluations/validate"
"""Stands for any folder of samples when looking up the files that belong to one."""


class EvaluationRecord:
    """``FOLDER/SET/batch_0000.parquet`` files and a manifest that identifies policy, prompts and settings.

    An unfinished record of the same evaluation is resumed. A different one is moved aside with its results
    (``FOLDER.1``).

    Args:
        folder: e.g. ``evaluations/validate``.
        fingerprint: digests of everything that determines samples and verdicts (see :func:`fingerprint`). None, for
            evaluations during training, overwrites an existing record.
    """

    def __init__(self, folder: Path, fingerprint: Mapping[str, str] | None) -> None:
        self.folder = folder
        new = {"version": __version__, "fingerprint": fingerprint and dict(fingerprint), "complete": False, "files": {}}
        self._manifest = read_manifest(folder) or {}
        same = all(self._manifest.get(name) == new[name] for name in ("version", "fingerprint", "complete"))
        self.continues = fingerprint is not None and same and isinstance(self._manifest.get("files"), dict)
        if self.continues:
            return
        if fingerprint is None:
            remove(folder, own_in(folder, _NAME))
        else:
            _set_aside(folder)
        self._manifest = new
        write_json(folder / MANIFEST, new)

    def read(self, name: str, batch: int, prompts: list[Prompt], seeds: Sequence[Sequence[int]]) -> list[Group] | None:
        """The responses of a recorded batch; None if it is missing or its file was modified."""
        key = _file(name, batch)
        path, recorded = self.folder / key, self._manifest["files"].get(key) if self.continues else None
        if recorded is None or not path.exists() or _digest(path) != recorded:
            return None
        return read_groups(path, prompts, seeds)

    def write(self, name: str, batch: int, rollout: Rollout) -> None:
        key = _file(name, batch)
        self._manifest["files"][key] = _digest(write_parquet(self.folder / key, rollout, tokens=True))
        write_json(self.folder / MANIFEST, self._manifest)


def _file(name: str, batch: int) -> str:
    return f"{name}/batch_{batch:04d}.parquet"


def fingerprint(weights: Iterable[tuple[str, Tensor]], settings: Mapping[str, Any]) -> dict[str, str]:
    """Digests of the weights (all bytes) and of each setting."""
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in weights:
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    texts = {name: json.dumps(describe(value), sort_keys=True) for name, value in settings.items()}
    return {
        "weights": digest.hexdigest(),
        **{name: hashlib.blake2b(text.encode(), digest_size=16).hexdigest() for name, text in texts.items()},
    }


def describe(value: Any, depth: int = 0) -> Any:
    """A JSON description of ``value``: plain data as is, an object as its class and public attributes.

    Classes and functions of other packages include their source file, so that changing a verifier, or a helper in its
    file, invalidates recorded verdicts.
    """
    if value is None or (isinstance(value, bool | int | float | str) and not isinstance(value, Enum)):
        return value
    if isinstance(value, Mapping):
        return {str(key): describe(item, depth + 1) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        items = [describe(item, depth + 1) for item in value]
        return items if isinstance(value, list | tuple) else sorted(items, key=str)
    if isinstance(value, Tensor):
        return [str(value.dtype), value.tolist()]
    if isinstance(value, type) or inspect.isroutine(value):
        return _code(value)
    if isinstance(value, Enum) or not hasattr(value, "__dict__"):  # paths, dtypes, fractions
        return [type(value).__qualname__, repr(value)]
    description = _code(type(value))
    if depth < 6:
        settings = {name: item for name, item in vars(value).items() if _is_setting(name, item)}
        description |= {name: describe(item, depth + 1) for name, item in settings.items()}
    return description


def _is_setting(name: str, item: Any) -> bool:
    """Whether an attribute is public and no callable object (a tokenizer), unless it is a reward, class or function."""
    is_code = isinstance(item, Reward | type) or inspect.isroutine(item)
    return not name.startswith("_") and (is_code or not callable(item))


def _code(code: Any) -> dict[str, Any]:
    """The name of a class or function, and the source of it and its bases, each with its whole module."""
    description: dict[str, Any] = {"class": f"{_module(code)}.{code.__qualname__}"}
    for part in getattr(code, "__mro__", [code]):
        module = _module(part)
        if module.split(".")[0] in ("ibro_lightning", *sys.stdlib_module_names):  # covered by the version
            continue
        # The object's own source, too, because a notebook has no module source.
        description[f"source of {part.__qualname__}"] = _source(part)
        description[f"source of {module}"] = _source(sys.modules.get(module))
    return description


def _module(code: Any) -> str:
    return getattr(code, "__module__", None) or "builtins"


def _source(code: Any) -> str | None:
    try:
        return inspect.getsource(code)
    except (OSError, TypeError):
        return None


def _digest(path: Path) -> str:
    return hashlib.blake2b(path.read_bytes(), digest_size=16).hexdigest()


def _set_aside(folder: Path) -> None:
    """Move an earlier evaluation aside: its samples, and the results in ``FOLDER.json``."""
    results = folder.with_name(folder.name + ".json")
    own = own_in(folder, _NAME)
    if not own and not os.path.lexists(results):
        return
    aside = free_name(folder, ".json")
    if os.path.lexists(results):  # first, so that a crash in between leaves no results without their samples
        results.rename(aside.with_name(aside.name + ".json"))
    if own:
        set_aside(folder, aside, own)
    rank_zero_info(f"an earlier evaluation was in {folder}: moved to {aside}")
