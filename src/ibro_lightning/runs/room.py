"""Makes room for a new run in its folder: an earlier run is moved aside, and moved back if the new one is refused;
files of others stay.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from lightning.pytorch.utilities import rank_zero_info, rank_zero_only

from ibro_lightning.errors import ConfigError
from ibro_lightning.runs.claims import claim, in_the_way, refusal, survey
from ibro_lightning.runs.contents import PARTS, entry_of
from ibro_lightning.runs.marks import EARLIER, NOTHING, mark_text, read_mark, restore_mark, write_mark
from ibro_lightning.runs.model_folders import free_name, prune
from ibro_lightning.runs.moving import folder_itself, move, move_back, moving_alone, remove

FIT = PARTS["fit"]


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
        said: the mark's text before the earlier run was moved.
        says: the mark's text after that.
    """

    folder: Path
    aside: Path | None
    before: frozenset[Path] | None
    said: str | None
    says: str | None


@rank_zero_only
def make_room(folder: Path, needed: Iterable[Path], wait_s: float = 0.0) -> Room:
    """Move an earlier run aside, as no two runs share a folder, and claim the new run's names.

    Only files that the earlier run wrote are moved; those of others stay where they are.

    Args:
        needed: folders from which the new run starts, and which must not move.
        wait_s: seconds to wait for other commands that are active in the earlier run's folder.

    Raises:
        ConfigError: the folder cannot be a run's, holds a foreign file with a name that the run needs, or the policy
            from which the new run starts; or another command is active in it.
    """
    setting = "trainer.default_root_dir"
    for part in (folder, *folder.parents):
        if part.exists() and not part.is_dir():
            raise ConfigError(setting, str(folder), f"{part} is a file: write another folder")
    if folder.resolve() in (Path.cwd(), *Path.cwd().parents):
        raise ConfigError(setting, str(folder), "a run needs a folder of its own, such as runs/mine")
    if folder.is_symlink() and not folder.exists():  # left by a run that was killed while it started
        folder_itself(folder).mkdir(parents=True, exist_ok=True)
    config, mark, mark_before = folder / "config.yaml", read_mark(folder), mark_text(folder)
    if config.exists() and (mark is None or "config.yaml" not in mark.parts):
        raise ConfigError(setting, str(folder), "its config.yaml is none of ours: write another folder for the run")
    if found := in_the_way(folder, FIT):
        raise refusal(folder, found)
    aside = None
    if mark is not None and (config.exists() or holds_training(folder)):
        if inside := [source for source in needed if folder.resolve() in source.parents]:
            raise ConfigError(
                setting,
                str(folder),
                f"it holds the run that this run starts from ({inside[0]}): write another folder for the new run",
            )
        with moving_alone(folder, wait_s):
            aside = _move_aside(folder)
        if folder.exists():  # foreign files are left, which were not in the earlier run's way either
            write_mark(folder, FIT, in_place_of=NOTHING)
    before = frozenset(folder.rglob("*")) if folder.exists() else None
    room = Room(folder, aside, before, mark_before, mark_text(folder))
    claim(folder, FIT)
    return room


def _move_aside(folder: Path) -> Path:
    found, real = survey(folder), folder_itself(folder)
    aside, left = free_name(real), ""
    if found.foreign:
        write_mark(folder, ())  # it stays, so that the folder remains a run's if this process dies
        move(real, aside, survey(folder).own)
        left = f"; what is not of it stays, such as {found.foreign[0]}"
    else:
        real.rename(aside)
        if folder.is_symlink():
            real.mkdir()
    rank_zero_info(f"an earlier run was in {folder}: moved to {aside}{left}")
    return aside


@rank_zero_only
def reopen(folder: Path, checkpoint: Path | None = None) -> None:
    """Claim the folder of a run that resumes.

    Raises:
        ConfigError: one of the run's names is taken by something that is not the run's.
    """
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
    new = [path for path in survey(folder).own if folder / path not in before and _is_training(path)]
    if any(path.startswith(("rollouts/", "evaluations/", "checkpoints/")) for path in new):
        return
    remove(folder, new)
    for path in sorted(folder.rglob("*"), reverse=True):
        if path not in before and path.is_dir() and not path.is_symlink():
            prune(path)
    if folder.is_dir():
        restore_mark(folder, room.says)
    if room.before is None:
        prune(folder)
    if room.aside is not None:
        move_back(room.aside, folder_itself(folder))
        restore_mark(folder, room.said)
        rank_zero_info(f"the new run was refused: {room.aside} is back in {folder}")


def _is_training(path: str) -> bool:
    entry = entry_of(path)
    return entry is None or entry.part in FIT
