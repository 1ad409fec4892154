"""Which checkpoints a folder holds, and whether they are whole."""

from __future__ import annotations

import json
import pickle
import re
import zipfile
from pathlib import Path

import torch

REFUSED = "it holds something other than tensors and plain values, which is not loaded"
MANIFEST = "manifest.json"
"""In a checkpoint of shards, written last: the sizes of all its files in bytes."""
_NAME = re.compile(r"iteration_(\d{6,})\.ckpt")


def checkpoint_name(iteration: int) -> str:
    return f"iteration_{iteration:06d}.ckpt"


def iteration_of(path: Path) -> int | None:
    """The iteration that a checkpoint's name tells; None for other names."""
    match = _NAME.fullmatch(path.name)
    return int(match[1]) if match else None


def checkpoints_in(folder: Path) -> list[Path]:
    """All checkpoints by name, whole or not, the newest first."""
    if not folder.is_dir():
        return []
    found = [(iteration, path) for path in folder.iterdir() if (iteration := iteration_of(path)) is not None]
    return [path for _, path in sorted(found, reverse=True)]


def newest_valid(folder: Path) -> tuple[Path | None, dict[Path, str]]:
    """``(the newest checkpoint that is whole or None, newer ones that are not: why)``."""
    passed_over: dict[Path, str] = {}
    for path in checkpoints_in(folder):
        if (reason := why_invalid(path)) is None:
            return path, passed_over
        passed_over[path] = reason
    return None, passed_over


def why_invalid(path: Path) -> str | None:
    """What is wrong with a checkpoint, in a few words, or None.

    A file is read once: every part of it has a checksum, which torch does not look at when it loads. Of a folder only
    the sizes are compared, since each process reads no more of it than its own share.
    """
    try:
        return _why_no_folder(path) if path.is_dir() else _why_no_file(path)
    except OSError as error:
        return f"it cannot be read: {error.strerror or error}"


def _why_no_file(path: Path) -> str | None:
    if not path.is_file():
        return "no such file"
    try:
        if not zipfile.is_zipfile(path):
            return "this file is no checkpoint, or only a part of one"
        with zipfile.ZipFile(path) as parts:
            if not any(name.endswith("/data.pkl") for name in parts.namelist()):
                return "this file is no checkpoint"
            # torch takes a part that is marked as a folder for an empty one, without a word.
            folders = [part.filename for part in parts.infolist() if part.external_attr & 0x10]
            if folders or (damaged := parts.testzip()):
                return f"the file is damaged: {folders[0] if folders else damaged} does not match its checksum"
        torch.load(path, map_location="cpu", weights_only=True, mmap=True)  # opened, not read again
    except pickle.UnpicklingError:
        return REFUSED
    except Exception as error:  # what a flipped bit makes zipfile and torch raise is not to be foreseen
        return f"the file is damaged: {' '.join(str(error).split())[:120]}"
    return None


def _why_no_folder(path: Path) -> str | None:
    try:
        sizes = json.loads((path / MANIFEST).read_text())["files"]
    except FileNotFoundError:
        return "this folder is no checkpoint, or only a part of one"
    except (ValueError, KeyError, TypeError):
        return f"its {MANIFEST} is damaged"
    for name, size in sizes.items():
        file = path / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != size:
            return f"{name} has {file.stat().st_size} bytes instead of {size}"
    return None
