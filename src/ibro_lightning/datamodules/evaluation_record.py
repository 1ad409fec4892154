"""An evaluation on disk: all its samples, batch by batch, so that one that was killed goes on where it was."""

from __future__ import annotations

import hashlib
import inspect
import json
import shutil
import sys
from collections.abc import Iterable, Mapping, Sequence
from enum import Enum
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from ibro_lightning.records import MANIFEST, read_groups, read_manifest, write_parquet
from ibro_lightning.rewards import Reward
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
        new = {"version": __version__, "fingerprint": fingerprint and dict(fingerprint), "complete": False, "files": {}}
        self._manifest = read_manifest(folder) or {}
        same = all(self._manifest.get(name) == new[name] for name in ("version", "fingerprint", "complete"))
        self.continues = fingerprint is not None and same and isinstance(self._manifest.get("files"), dict)
        if self.continues:
            return
        if fingerprint is None:
            shutil.rmtree(folder, ignore_errors=True)
        else:
            _set_aside(folder)
        self._manifest = new
        write_json(folder / MANIFEST, new)

    def read(
        self, name: str, batch: int, prompts: Sequence[Prompt], seeds: Sequence[Sequence[int]]
    ) -> list[Group] | None:
        """The responses of a batch that is done, or None. A file that has changed since it was written is not one."""
        path = self._path(name, batch)
        known = self._manifest["files"].get(self._key(path)) if self.continues else None
        if known is None or not path.exists() or _digest(path) != known:
            return None
        return read_groups(path, prompts, seeds)

    def write(self, name: str, batch: int, rollout: Rollout) -> None:
        path = write_parquet(self._path(name, batch), rollout, tokens=True)
        self._manifest["files"][self._key(path)] = _digest(path)
        write_json(self.folder / MANIFEST, self._manifest)

    def _key(self, path: Path) -> str:
        return path.relative_to(self.folder).as_posix()

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
    """What ``value`` is, as JSON: plain data as it stands; an object as its class and its public attributes. A class or
    function that is not ours comes with the text of the file it is written in: a verifier that was mended, or a helper
    that it calls, must not be given the old verdicts."""
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
    if isinstance(value, Enum) or not hasattr(value, "__dict__"):  # paths, dtypes, fractions: what they print as
        return [type(value).__qualname__, repr(value)]
    said = _code(type(value))
    if depth < 6:
        said |= {name: describe(item, depth + 1) for name, item in vars(value).items() if _counts(name, item)}
    return said


def _counts(name: str, item: Any) -> bool:
    """Does an attribute say what an object does? Private ones are its caches. Rewards and functions can be called, and
    count; so can tokenizers and the like, which are none of its settings."""
    called = isinstance(item, Reward | type) or inspect.isroutine(item)
    return not name.startswith("_") and (called or not callable(item))


def _code(code: Any) -> dict[str, Any]:
    """The name of a class or function; the source text of it and its bases, each with the whole file that it is in."""
    said: dict[str, Any] = {"class": f"{_module(code)}.{code.__qualname__}"}
    for part in getattr(code, "__mro__", [code]):
        module = _module(part)
        if module.split(".")[0] in ("ibro_lightning", *sys.stdlib_module_names):  # the version speaks for ours
            continue
        # Its own text, too: that of a notebook's cell can be had, that of the notebook cannot.
        said |= {
            f"source of {part.__qualname__}": _source(part),
            f"source of {module}": _source(sys.modules.get(module)),
        }
    return said


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
    """Keep an earlier evaluation under another name: its samples, and the results in ``FOLDER.json``."""
    results = folder.with_name(folder.name + ".json")
    if not folder.exists() and not results.exists():
        return
    aside = free_name(folder, ".json")
    if results.exists():  # first, so that a kill in between leaves no results beside samples that they are not of
        results.rename(aside.with_name(aside.name + ".json"))
    if folder.exists():
        folder.rename(aside)
    rank_zero_info(f"an earlier evaluation was in {folder}: moved to {aside}")
