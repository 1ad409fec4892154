"""Whether a checkpoint is complete and undamaged, fits the model, and can be resumed from.

Reading many gigabytes takes a while, so results are cached.
"""

from __future__ import annotations

import os
import pickle
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ibro_lightning.errors import ConfigError
from ibro_lightning.runs.checkpoints.index import ShardReader, read_rest
from ibro_lightning.runs.checkpoints.manifest import why_differs
from ibro_lightning.runs.run_files import is_shard

REFUSED = "it holds something other than tensors and plain values, which is not loaded"
_CHUNK = 2**22

_Stamp = tuple[tuple[str, int, int, int], ...]
_results: dict[Path, tuple[_Stamp, str | None]] = {}


def why_invalid(path: Path, share: int = 0, shares: int = 1) -> str | None:
    """What is wrong with a checkpoint, in a few words, or None. Reads all of it: every part of a file has a checksum,
    which torch ignores when it loads, and every file of a folder has a digest in its manifest. (A folder that an
    earlier version wrote has sizes only.)

    Args:
        share: read only every ``shares``-th large part, beginning with this one: for ranks that divide the work and
            then agree on the result.
    """
    try:
        stamp = _stamp(path)
        reason = _why_no_folder(path, share, shares) if path.is_dir() else _why_no_file(path, share, shares)
    except OSError as error:
        return f"it cannot be read: {error.strerror or error}"
    if shares == 1 or reason is not None:
        _results[_real_path(path)] = (stamp, reason)
    return reason


def why_known_invalid(path: Path, share: int = 0, shares: int = 1) -> str | None:
    """:func:`why_invalid`, cached: reads only what this process has neither written nor read in its present state."""
    stamp, reason = _results.get(_real_path(path), ((), None))
    try:
        if stamp and stamp == _stamp(path):
            return reason
    except OSError:
        pass
    return why_invalid(path, share, shares)


def record_valid(path: Path) -> None:
    """Record a checkpoint that this process has just written as valid."""
    _results[_real_path(path)] = (_stamp(path), None)


def _stamp(path: Path) -> _Stamp:
    """A value that changes whenever the checkpoint is written to."""
    inside = sorted(file for file in path.iterdir() if is_shard(file.name)) if path.is_dir() else []
    files = inside or ([path] if path.is_file() else [])
    stats = [(file.name, file.stat()) for file in files]
    return tuple((name, found.st_size, found.st_mtime_ns, found.st_ino) for name, found in stats)


def _real_path(path: Path) -> Path:
    return Path(os.path.realpath(path))  # Path.resolve raises for circular links


def _why_no_file(path: Path, share: int, shares: int) -> str | None:
    if not path.is_file():
        return "no such file"
    try:
        if not zipfile.is_zipfile(path):
            return "this file is not a checkpoint, or only a part of one"
        with zipfile.ZipFile(path) as parts:
            if not any(name.endswith("/data.pkl") for name in parts.namelist()):
                return "this file is not a checkpoint"
            # torch silently reads a part that is marked as a folder as an empty one.
            folders = [part.filename for part in parts.infolist() if part.external_attr & 0x10]
            if folders or (damaged := _damaged_part(parts, parts.infolist()[share::shares])):
                return f"the file is damaged: {folders[0] if folders else damaged} does not match its checksum"
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)  # mapped, so not read again
    except pickle.UnpicklingError:
        return REFUSED
    except Exception as error:  # a flipped bit can make zipfile and torch raise anything
        return f"the file is damaged: {_short(error)}"
    return None if isinstance(content, dict) and "state_dict" in content else "this file is not a checkpoint"


def _damaged_part(archive: zipfile.ZipFile, parts: list[zipfile.ZipInfo]) -> str | None:
    """The first of the ``parts`` whose bytes do not match their checksum."""
    for part in parts:
        try:
            with archive.open(part) as content:
                while content.read(_CHUNK):
                    pass
        except zipfile.BadZipFile:
            return part.filename
    return None


def _why_no_folder(path: Path, share: int, shares: int) -> str | None:
    if (reason := why_differs(path, share, shares)) is not None:
        return reason
    for name, read in ((".metadata", ShardReader(path).tensors), ("meta.pt", lambda: read_rest(path))):
        try:
            if not isinstance(read(), dict):
                return f"{name} is not part of a checkpoint"
        except pickle.UnpicklingError:
            return f"{name} is damaged, or {REFUSED}"
        except Exception as error:  # as above
            return f"{name} is damaged: {_short(error)}"
    return None


def _short(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:120]


def check_fits(saved: Mapping[str, Iterable[int]], module: nn.Module, path: str | Path) -> None:
    """Raise :class:`ConfigError` if names or shapes of saved weights differ from a module's; in one line, not torch's
    complete list."""
    shapes = {name: tuple(shape) for name, shape in saved.items()}
    expected = {name: tuple(value.shape) for name, value in module.state_dict().items() if isinstance(value, Tensor)}
    missing, unknown = sorted(expected.keys() - shapes.keys()), sorted(shapes.keys() - expected.keys())
    differ = [name for name in sorted(expected.keys() & shapes.keys()) if expected[name] != shapes[name]]
    problems = [f"it lacks {len(missing)} weights, such as {missing[0]}"] if missing else []
    problems += [f"it has {len(unknown)} weights more, such as {unknown[0]}"] if unknown else []
    problems += [f"its {n} is {list(shapes[n])}, not {list(expected[n])}" for n in differ[:1]]
    if problems:
        raise ConfigError(
            "ckpt_path",
            str(path),
            f"it is of another model or algorithm than this {type(module).__name__}: {'; '.join(problems)}. "
            "Resume with the recipe that its run was started with",
        )


def check_limits(rest: Mapping[str, Any], max_epochs: int | None, max_steps: int, path: str | Path) -> None:
    """Raise :class:`ConfigError` if a checkpoint (``rest``: without its tensors) is beyond the Trainer's limits.
    Equality is fine: nothing is left to train."""
    progress = rest.get("loops", {}).get("fit_loop", {}).get("epoch_progress", {}).get("current", {})
    for flag, limit, done, what in (
        ("max_epochs", max_epochs, progress.get("ready", 0), "epoch"),
        ("max_steps", max_steps, rest.get("global_step", 0), "optimizer step"),
    ):
        if limit is not None and 0 <= limit < done:
            remedy = f"{path} is already in {what} {done}: write {done} to train no further, or more to continue"
            raise ConfigError(f"trainer.{flag}", limit, remedy)
