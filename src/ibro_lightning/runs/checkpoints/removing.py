"""Removes checkpoints file by file, so that files of others in their folders stay."""

from __future__ import annotations

import errno
import json
from pathlib import Path

from lightning.pytorch.utilities import rank_zero_info

from ibro_lightning.runs.checkpoints.index import REST
from ibro_lightning.runs.checkpoints.manifest import MANIFEST
from ibro_lightning.runs.contents import is_shard
from ibro_lightning.runs.model_folders import prune


def remove_checkpoint(path: Path) -> None:
    """Remove a checkpoint, valid or not, if it exists; report a folder that is left. See :func:`remove_own`."""
    if (other := remove_own(path)) is not None:
        rank_zero_info(f"{path} stays, without the checkpoint's files: {other} in it does not belong to the checkpoint")


def remove_own(path: Path) -> str | None:
    """Remove a checkpoint's files: those in a folder's manifest or, if the folder is incomplete, those with names that
    DCP and this package use. Returns the name of a foreign file for which the folder has to stay, if any.

    The manifest goes last: if the process dies meanwhile, the remains are not a valid checkpoint but still recognisably
    the run's, so that the next removal deletes them."""
    if not path.is_dir() or path.is_symlink():
        path.unlink(missing_ok=True)
        return None
    for file in sorted(_own_files(path), key=lambda file: (file.name == MANIFEST, file.name)):
        file.unlink()
    for inside in [found for found in path.iterdir() if found.is_dir() and not found.is_symlink()]:
        prune(inside)  # empty folders hold nothing to keep
    try:
        path.rmdir()
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        return min(file.name for file in path.iterdir())
    return None


def may_be_unfinished(path: Path) -> bool:
    """Whether a file may be a checkpoint whose writer died: it is empty or starts like a zip archive."""
    with path.open("rb") as file:
        return file.read(4) in (b"", b"PK\3\4")


def _own_files(folder: Path) -> list[Path]:
    try:
        listed = {MANIFEST, REST, *json.loads((folder / MANIFEST).read_text())["files"]}
    except (OSError, ValueError, LookupError, TypeError):
        listed = None
    return [
        file
        for file in folder.iterdir()
        if is_shard(file.name) and file.is_file() and not file.is_symlink() and (listed is None or file.name in listed)
    ]
