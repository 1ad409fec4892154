"""Moves an earlier run aside for a new one, and back if the new one is refused, even with foreign files among its own,
and even if the process dies meanwhile.

A folder that holds only the run's files is renamed. From any other folder the run's files are moved one by one, into a
folder with a temporary name until all have arrived; if the process dies, the move is undone later. A move holds the
locks of all commands, so that no other one reads or writes in the folder meanwhile.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from lightning.pytorch.utilities import rank_zero_info, rank_zero_only

from ibro_lightning.errors import ConfigError
from ibro_lightning.guards.disk import PARTIAL, free_name
from ibro_lightning.runs.claims import claim, in_the_way, refusal, survey
from ibro_lightning.runs.holding import LOOK_S, FolderLock
from ibro_lightning.runs.marks import EARLIER, Mark, merge_mark, read_mark, read_mark_file, restore_mark, write_mark
from ibro_lightning.runs.model_folders import leaves, move_files, prune, remove
from ibro_lightning.runs.run_files import MARK, MODELS, MOVING, PARTS, entry_of

PATIENCE_S = 30.0
"""Seconds that a command waits for another one to undo a killed run's move."""
FIT = PARTS["fit"]


def folder_itself(folder: Path) -> Path:
    """``folder`` with its own link resolved: a move keeps the link in place and the run on its disk."""
    return folder.resolve() if folder.is_symlink() else folder


def move(folder: Path, aside: Path, files: Iterable[str]) -> Path:
    """Move ``files`` (relative to ``folder``) to ``aside``, which does not exist yet. The mark is copied."""
    partial = aside.with_name(aside.name + PARTIAL)
    partial.mkdir()
    (partial / MOVING).touch()
    if MARK in (names := set(files)):
        (partial / MARK).write_bytes((folder / MARK).read_bytes())
    # The file that identifies a folder of an earlier version as a run's goes last.
    move_files(folder, sorted(names - {MARK}, key=lambda name: (name == "config.yaml", name)), partial)
    partial.rename(aside)
    (aside / MOVING).unlink()
    return aside


def recover(folder: Path) -> None:
    """Undo a move in this folder whose process died."""
    for partial in _unfinished_moves(folder):
        if (partial / MOVING).is_file():
            _undo(partial, folder_itself(folder))
        else:  # the process died before it moved anything
            partial.rmdir()


def recover_alone(folder: Path, command: str) -> None:
    """:func:`recover`, for a command other than ``fit``. Raises :class:`ConfigError` if a live run moves files."""
    until = time.monotonic() + PATIENCE_S
    while _unfinished_moves(folder):
        try:
            with FolderLock(folder, "fit", by=command).held():
                recover(folder)
        except ConfigError:
            if time.monotonic() >= until:
                raise
            time.sleep(LOOK_S)


@contextmanager
def moving_alone(folder: Path, wait_s: float = 0.0) -> Iterator[None]:
    """Keep all other commands out of the folder of a run that holds its lock. Raises :class:`ConfigError` if one is
    still active after ``wait_s`` seconds."""
    with ExitStack() as stack:
        locks = [FolderLock(folder, command, by="fit") for command in PARTS if command != "fit"]
        exported = [folder / model for model in MODELS if (folder / f".{model}.export.lock").exists()]
        for lock in (*locks, *(FolderLock(place, "export", by="fit") for place in exported)):
            stack.enter_context(lock.held(wait_s))
        yield


def _unfinished_moves(folder: Path) -> list[Path]:
    itself = folder_itself(folder)
    candidates = dict.fromkeys([(folder.parent, folder.name), (itself.parent, itself.name), (folder, "earlier")])
    return [
        path
        for parent, name in candidates
        for path in (sorted(parent.iterdir()) if parent.is_dir() else [])
        if re.fullmatch(rf"{re.escape(name)}\.\d+{re.escape(PARTIAL)}", path.name) and path.is_dir()
        if (path / MOVING).is_file() or not any(path.iterdir())
    ]


def _undo(partial: Path, folder: Path) -> None:
    for name in sorted(leaves(partial), key=lambda name: (name not in (MARK, "config.yaml"), name)):
        if name != MOVING and not os.path.lexists(folder / name):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (partial / name).rename(folder / name)
    if (partial / MARK).exists():
        merge_mark(folder, partial)
        (partial / MARK).unlink()  # its copy
    (partial / MOVING).unlink()
    prune(partial)
    if partial.exists():  # holds files whose names were taken meanwhile
        partial.rename(free_name(partial.with_name(re.sub(r"\.\d+\.partial$", "", partial.name))))


def holds_training(folder: Path) -> bool:
    """Whether the folder holds files of a run's iterations."""
    found = (path for part in ("rollouts", "checkpoints") for path in folder.glob(f"{part}/iteration_*"))
    return any(entry_of(path.relative_to(folder).as_posix()) for path in found)


@dataclass(frozen=True)
class Room:
    """The state of a run's folder before the run, for :func:`put_back`.

    Args:
        aside: where an earlier run was moved.
        before: paths below ``folder``, without the earlier run's; None if it did not exist.
        earlier_mark: the mark before the earlier run was moved.
        mark: the mark after that.
    """

    folder: Path
    aside: Path | None
    before: frozenset[Path] | None
    earlier_mark: Mark | None
    mark: Mark | None


@rank_zero_only
def make_room(folder: Path, needed: Iterable[Path], wait_s: float = 0.0) -> Room:
    """Move an earlier run aside, as no two runs share a folder, and claim the new run's names. Only files that the
    earlier run wrote are moved; those of others stay where they are.

    Raises :class:`ConfigError` if the folder cannot be a run's, holds a foreign file with a name that the run needs, or
    one of the folders ``needed`` by the new run; or if another command is still active in it after ``wait_s`` seconds.
    """
    setting = "trainer.default_root_dir"
    for part in (folder, *folder.parents):
        if part.exists() and not part.is_dir():
            raise ConfigError(setting, str(folder), f"{part} is a file: write another folder")
    if folder.resolve() in (Path.cwd(), *Path.cwd().parents):
        raise ConfigError(setting, str(folder), "a run needs a folder of its own, such as runs/mine")
    if folder.is_symlink() and not folder.exists():  # left by a run that was killed while it started
        folder_itself(folder).mkdir(parents=True, exist_ok=True)
    config, mark, earlier_mark = folder / "config.yaml", read_mark(folder), read_mark_file(folder)
    if config.exists() and (mark is None or "config.yaml" not in mark.parts):
        raise ConfigError(setting, str(folder), "its config.yaml is from no run of this folder: write another folder")
    if found := in_the_way(folder, FIT):
        raise refusal(folder, found)
    aside = None
    if mark is not None and (config.exists() or holds_training(folder)):
        if inside := [source for source in needed if folder.resolve() in source.parents]:
            remedy = f"it holds the run that this run starts from ({inside[0]}): write another folder for the new run"
            raise ConfigError(setting, str(folder), remedy)
        with moving_alone(folder, wait_s):
            aside = _move_aside(folder)
        if folder.exists():  # foreign files are left, which were not in the earlier run's way either
            write_mark(folder, FIT, in_place_of=Mark())
    before = frozenset(folder.rglob("*")) if folder.exists() else None
    room = Room(folder, aside, before, earlier_mark, read_mark_file(folder))
    claim(folder, FIT)
    return room


def _move_aside(folder: Path) -> Path:
    found, real = survey(folder), folder_itself(folder)
    aside, left = free_name(real), ""
    if found.foreign:
        write_mark(folder, ())  # it stays, so that the folder remains a run's if this process dies
        move(real, aside, survey(folder).own)
        left = f"; other files stay, such as {found.foreign[0]}"
    else:
        real.rename(aside)
        if folder.is_symlink():
            real.mkdir()
    rank_zero_info(f"an earlier run was in {folder}: moved to {aside}{left}")
    return aside


@rank_zero_only
def reopen(folder: Path, checkpoint: Path | None = None) -> None:
    """Claim the folder of a run that resumes."""
    if checkpoint is not None:
        recognize(folder, checkpoint)
    claim(folder, FIT)


def recognize(folder: Path, checkpoint: Path) -> None:
    """Mark an unmarked folder that holds the checkpoint as a run's: earlier versions, from Python, left no mark."""
    if read_mark(folder) is None and checkpoint.resolve().parent == (folder / "checkpoints").resolve():
        write_mark(folder, FIT, in_place_of=EARLIER)


@rank_zero_only
def put_back(room: Room) -> None:
    """Undo :func:`make_room` and remove all traces of a run that was refused before it computed anything."""
    folder, before = room.folder, room.before or frozenset[Path]()
    # Files that another command has written meanwhile stay.
    entries = {path: entry_of(path) for path in survey(folder).own if folder / path not in before}
    new = [path for path, entry in entries.items() if entry is None or entry.part in FIT]
    if any(path.startswith(("rollouts/", "evaluations/", "checkpoints/")) for path in new):
        return
    remove(folder, new)
    for path in sorted(folder.rglob("*"), reverse=True):
        if path not in before and path.is_dir() and not path.is_symlink():
            prune(path)
    if folder.is_dir():
        restore_mark(folder, room.mark)
    if room.before is None:
        prune(folder)
    if room.aside is not None:
        _move_back(room.aside, folder_itself(folder))
        restore_mark(folder, room.earlier_mark)
        rank_zero_info(f"the new run was refused: {room.aside} is back in {folder}")


def _move_back(aside: Path, folder: Path) -> None:
    if not os.path.lexists(folder):
        aside.rename(folder)
        return
    partial = aside.with_name(aside.name + PARTIAL)
    (aside / MOVING).touch()
    aside.rename(partial)
    _undo(partial, folder)
