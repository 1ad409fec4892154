"""How checkpoints get their names, which are kept, and how others are removed: file by file. Nothing that this run did
not write is removed or replaced."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Collection
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities import rank_zero_info

from ibro_lightning.guards.disk import PARTIAL, free_name, to_disk
from ibro_lightning.runs.checkpoints.catalog import FROM, Written, checkpoints_in, iteration_of
from ibro_lightning.runs.checkpoints.index import REST, read_rest, write_rest
from ibro_lightning.runs.checkpoints.manifest import MANIFEST, updated_manifest
from ibro_lightning.runs.checkpoints.validity import record_valid, why_known_invalid
from ibro_lightning.runs.model_folders import prune
from ibro_lightning.runs.run_files import is_shard

LAST = "last.ckpt"


class Keeper:
    """Names and removes the checkpoints in a run's folder; used by one process only.

    Args:
        folder: the run's ``checkpoints/``.
        keep_last: how many of the newest valid checkpoints to keep; None keeps all.
    """

    def __init__(self, folder: Path, keep_last: int | None) -> None:
        self.folder, self.keep_last = folder, keep_last

    @property
    def run_id(self) -> str:
        return Written(self.folder).run_id

    def resume_from(self, checkpoint: Path) -> None:
        """Make ``checkpoint``, from which the run resumes, the newest, and set aside this run's damaged ones after it.
        Call it before anything is written."""
        written = Written(self.folder)
        if not written.wrote(checkpoint):
            written.add(checkpoint, checkpoint.name, FROM)
        self._link(checkpoint)
        for path in checkpoints_in(self.folder):
            if path.name == checkpoint.name:
                break
            if written.has_name(path) and (reason := why_known_invalid(path)) is not None:
                self._set_aside(path, "damaged", reason)

    def has(self, path: Path) -> bool:
        """Whether ``path`` is a valid checkpoint of this run's history."""
        return Written(self.folder).lists(path) and why_known_invalid(path) is None

    def make_way(self, partial: Path) -> None:
        """Free a name for a checkpoint to be written: remove the remains of a run that died, set anything else
        aside."""
        if not partial.is_symlink() and (partial.is_dir() or (partial.is_file() and may_be_unfinished(partial))):
            remove_own(partial)
        if os.path.lexists(partial):
            self._set_aside(partial, "foreign", "this run did not write it, or not all of it")

    def give_name(self, partial: Path, path: Path) -> None:
        """Rename the complete ``partial`` to ``path``; what was there before is replaced or set aside."""
        to_disk(partial)
        written = Written(self.folder)
        ours = written.wrote(path)
        if os.path.lexists(path) and (not ours or path.is_dir()):  # a folder cannot be replaced in one step
            reason = why_known_invalid(path)
            kind = "damaged" if reason is not None and written.has_name(path) else "foreign"
            self._set_aside(path, kind, reason or "the link to the newest checkpoint takes its name")
        written.add(partial, path.name)
        to_disk(self.folder)  # even after a power failure, the list must precede the name
        os.replace(partial, path)
        record_valid(path)
        to_disk(self.folder)

    def update(self, path: Path, checkpoint: dict[str, Any]) -> None:
        """Replace everything but the tensors in a folder that this run wrote. The folder stays valid, and recognisably
        the run's, at every moment: while ``meta.pt`` is replaced, the manifest does not list it."""
        written = Written(self.folder)
        if not written.wrote(path):
            return
        partial = path.with_name(path.name + PARTIAL)
        partial.mkdir()
        rest = {name: value for name, value in checkpoint.items() if name != "state_dict"}
        write_rest(partial, rest | {"optimizer_states": read_rest(path)["optimizer_states"]})
        for listed in (False, True):
            (partial / MANIFEST).write_text(updated_manifest(path, REST, listed=listed))
            to_disk(partial / MANIFEST)
            written.add(partial, path.name)
            to_disk(self.folder)
            os.replace(partial / MANIFEST, path / MANIFEST)
            if not listed:
                to_disk(path)
                os.replace(partial / REST, path / REST)
            to_disk(path)
        partial.rmdir()
        record_valid(path)

    def keep(self, newest: Path, best: Collection[int]) -> None:
        """Link to the newest checkpoint and remove superseded ones, except those of the ``best`` iterations and any
        that this run did not write."""
        self._link(newest)
        written = Written(self.folder)
        kept = 1
        for path in checkpoints_in(self.folder) if self.keep_last is not None else ():
            if path.name == newest.name or path.is_symlink() or not written.wrote(path):
                continue
            if kept < (self.keep_last or 0):
                kept += why_known_invalid(path) is None
            elif iteration_of(path) not in best:
                remove_checkpoint(path)
        written.tidy(newest)

    def _link(self, path: Path) -> None:
        last, link = self.folder / LAST, self.folder / (LAST + PARTIAL)
        for name in (last, link):
            if os.path.lexists(name) and not _is_own_link(name):
                self._set_aside(name, "foreign", "the link to the newest checkpoint takes its name")
        if last.is_symlink() and os.readlink(last) == path.name:
            return
        link.unlink(missing_ok=True)
        link.symlink_to(path.name)
        os.replace(link, last)
        to_disk(self.folder)

    def _set_aside(self, path: Path, kind: str, reason: str) -> None:
        aside = path.with_name(f"{path.name}.{kind}")
        aside = free_name(aside) if os.path.lexists(aside) else aside
        path.rename(aside)
        rank_zero_info(f"{path} is now {aside.name}: {reason}")


def _is_own_link(path: Path) -> bool:
    return path.is_symlink() and "/" not in (target := os.readlink(path)) and iteration_of(Path(target)) is not None


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
