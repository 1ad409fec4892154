"""Moves a run's files aside and back, even with foreign files among them, and even if the process dies meanwhile.

A folder that holds only the run's files is renamed. From any other folder the run's files are moved one by one, into a
folder with a temporary name until all have arrived; if the process dies, the move is undone later. A move holds the
locks of all commands, so that no other one reads or writes in the folder meanwhile.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from ibro_lightning.errors import ConfigError
from ibro_lightning.guards.disk import PARTIAL
from ibro_lightning.runs.contents import MARK, MODELS, MOVING, PARTS, entry_of
from ibro_lightning.runs.holding import LOOK_S, FolderLock
from ibro_lightning.runs.marks import merge_mark
from ibro_lightning.runs.model_folders import free_name, leaves, prune

PATIENCE_S = 30.0
"""Seconds that a command waits for another one to undo a killed run's move."""
_LAST = ("config.yaml", MARK)
"""Moved last, as they identify a folder as a run's."""


def folder_itself(folder: Path) -> Path:
    """``folder`` with its own link resolved: a move keeps the link in place and the run on its disk."""
    return folder.resolve() if folder.is_symlink() else folder


def move(folder: Path, aside: Path, files: Iterable[str]) -> Path:
    """Move ``files`` (relative to ``folder``) to ``aside``, which does not exist yet. The mark is copied."""
    partial = aside.with_name(aside.name + PARTIAL)
    partial.mkdir()
    (partial / MOVING).touch()
    for name in sorted(files, key=lambda name: (name in _LAST, name)):
        target = partial / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if name == MARK:
            target.write_bytes((folder / name).read_bytes())
            continue
        (folder / name).rename(target)
        _prune_upwards((folder / name).parent, folder)
    partial.rename(aside)
    (aside / MOVING).unlink()
    return aside


def move_back(aside: Path, folder: Path) -> None:
    """Undo :func:`move`."""
    if not os.path.lexists(folder):
        aside.rename(folder)
        return
    partial = aside.with_name(aside.name + PARTIAL)
    (aside / MOVING).touch()
    aside.rename(partial)
    _undo(partial, folder)


def recover(folder: Path) -> None:
    """Undo a move in this folder whose process died."""
    for partial in _unfinished_moves(folder):
        if (partial / MOVING).is_file():
            _undo(partial, folder_itself(folder))
        elif not any(partial.iterdir()):  # the process died before it moved anything
            partial.rmdir()


def has_begun(folder: Path) -> bool:
    """Whether there is a move for :func:`recover` to undo."""
    return any((partial / MOVING).is_file() or not any(partial.iterdir()) for partial in _unfinished_moves(folder))


@contextmanager
def moving_alone(folder: Path, wait_s: float = 0.0) -> Iterator[None]:
    """Keep all other commands out of the folder of a run that holds its lock.

    Args:
        wait_s: seconds to wait for other commands to end.

    Raises:
        ConfigError: another command is active in the folder.
    """
    with ExitStack() as stack:
        locks = [FolderLock(folder, command, by="fit") for command in PARTS if command != "fit"]
        exported = [folder / model for model in MODELS if (folder / f".{model}.export.lock").exists()]
        for lock in (*locks, *(FolderLock(place, "export", by="fit") for place in exported)):
            lock.take(wait_s)
            stack.callback(lock.release)
        yield


def recover_alone(folder: Path, command: str) -> None:
    """:func:`recover`, for a command other than ``fit``.

    Raises:
        ConfigError: a live run is moving files.
    """
    until = time.monotonic() + PATIENCE_S
    while has_begun(folder):
        lock = FolderLock(folder, "fit", by=command)
        try:
            lock.take()
        except ConfigError:
            if time.monotonic() >= until:
                raise
            time.sleep(LOOK_S)
            continue
        try:
            recover(folder)
        finally:
            lock.release()


def _unfinished_moves(folder: Path) -> list[Path]:
    itself = folder_itself(folder)
    candidates = dict.fromkeys([(folder.parent, folder.name), (itself.parent, itself.name), (folder, "earlier")])
    return [
        path
        for parent, name in candidates
        for path in (sorted(parent.iterdir()) if parent.is_dir() else [])
        if re.fullmatch(rf"{re.escape(name)}\.\d+{re.escape(PARTIAL)}", path.name) and path.is_dir()
    ]


def _undo(partial: Path, folder: Path) -> None:
    for name in sorted(leaves(partial), key=lambda name: (name not in _LAST, name)):
        target = folder / name
        if name != MOVING and not os.path.lexists(target):
            target.parent.mkdir(parents=True, exist_ok=True)
            (partial / name).rename(target)
    if (partial / MARK).exists():
        merge_mark(folder, partial)
        (partial / MARK).unlink()  # its copy
    (partial / MOVING).unlink()
    prune(partial)
    if partial.exists():  # holds files whose names were taken meanwhile
        partial.rename(free_name(partial.with_name(re.sub(r"\.\d+\.partial$", "", partial.name))))


def remove(folder: Path, files: Iterable[str]) -> None:
    """Remove ``files`` (relative to ``folder``), and the folders that this leaves empty."""
    for name in files:
        path = folder / name
        if path.is_dir() and not path.is_symlink():
            prune(path)
        else:
            path.unlink(missing_ok=True)
        _prune_upwards(path.parent, folder)


def _prune_upwards(path: Path, top: Path) -> None:
    while path not in (top, top.parent):
        try:
            path.rmdir()
        except OSError:
            return
        path = path.parent


# Single parts of a run's folder: an evaluation, predictions.


def own_in(folder: Path, name: str) -> tuple[list[str], bool]:
    """``(our files in a folder of samples, the manifest last; whether there are no others)``.

    Args:
        name: the folder's path in the run's folder, such as ``evaluations/validate``.
    """
    found = [] if folder.is_symlink() else list(leaves(folder))
    own = [file for file in found if entry_of(f"{name}/{file}") is not None]
    return sorted(own, key=lambda file: (file.startswith("_"), file)), len(own) == len(found)


def set_aside(folder: Path, aside: Path, own: Sequence[str], *, is_all: bool) -> None:
    """Move an earlier folder of samples to ``aside``; files of others stay."""
    if is_all:
        folder.rename(aside)
        return
    for file in own:
        (aside / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).rename(aside / file)
        _prune_upwards((folder / file).parent, folder)
