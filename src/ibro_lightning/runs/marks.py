"""The mark: a file that identifies a run's folder, and which of its files are the run's.

A folder of an earlier version has no mark; the header of its ``config.yaml`` (``validate.yaml``, …) serves as one.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import socket
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from ibro_lightning import __version__
from ibro_lightning.guards.disk import PARTIAL, disk_errors, written_atomically
from ibro_lightning.runs.model_folders import is_own_file
from ibro_lightning.runs.run_files import MARK, MODELS, PARTS, entry_of, part_of_folder

HEADER = "# ibro_lightning"
"""The beginning of a run's ``config.yaml``."""
_EVENTS = re.compile(r"(?:.*/)?events\.out\.tfevents\.\d{10}\.([^/]+\.\d+)\.\d+")
_START = b'{\n  "ibro_lightning": '
"""The beginning of a mark's content, in every version."""


@dataclass(frozen=True)
class Mark:
    """Which files in a run's folder are the run's.

    Args:
        parts: the names that commands claimed before they wrote them (:data:`.run_files.PARTS`).
        processes: the processes that have written here, as ``host.pid``, which TensorBoard's file names contain. None
            if the folder is of a version that did not record them.
        files: further files, written by loggers, relative to the folder.
        run: the run's random id, which its rollouts carry, too.
    """

    parts: frozenset[str] = frozenset()
    processes: frozenset[str] | None = frozenset()
    files: frozenset[str] = frozenset()
    run: str = ""

    def owns(self, folder: Path, path: str) -> bool:
        """Whether the run wrote the file ``path``, relative to the run's ``folder``, with slashes."""
        if (events := _EVENTS.fullmatch(path)) and not path.startswith(("evaluations", "earlier.")):
            return events[1] in self.processes if self.processes is not None else "/" not in path
        if path.removesuffix(".partial").removesuffix(".kept") in self.files:
            return True
        entry = entry_of(path)
        if entry is None or not (entry.part in self.parts or entry.part == MARK):
            return False
        return entry.part not in MODELS or is_own_file(folder, path, without_manifest=self.processes is None)

    def owns_folder(self, path: str) -> bool:
        """Whether an empty folder is the run's."""
        return part_of_folder(path) in self.parts


EARLIER = Mark(processes=None, files=frozenset({"hparams.yaml"}))
"""The mark of a run of a version that wrote none."""


def read_mark(folder: Path) -> Mark | None:
    """The folder's mark; None if it is not a run's folder."""
    if (mark := read_mark_file(folder)) is not None:
        return mark
    parts = [part for names in PARTS.values() if _has_header(folder / names[0]) for part in names]
    return replace(EARLIER, parts=frozenset(parts)) if parts else None


def read_mark_file(folder: Path) -> Mark | None:
    """:func:`read_mark` without regard to the headers of settings."""
    try:
        content = json.loads((folder / MARK).read_text())
        processes = content["processes"]
        return Mark(
            frozenset(map(str, content["parts"])),
            None if processes is None else frozenset(map(str, processes)),
            frozenset(map(str, content["files"])),
            str(content.get("run", "")),
        )
    except (OSError, ValueError, KeyError, TypeError):
        return None


def has_other_mark(folder: Path) -> bool:
    """Whether a file that is not ours has the mark's name. An incomplete mark is ours: the folder's settings serve as
    one until the next command rewrites it."""
    path = folder / MARK
    if not os.path.lexists(path) or read_mark_file(folder) is not None:
        return False
    if path.is_symlink() or not path.is_file():
        return True
    content = path.read_bytes().strip(b"\0")
    return not content.startswith(_START) and (bool(content) or read_mark(folder) is None)


def write_mark(
    folder: Path, parts: Iterable[str], files: Iterable[str] = (), *, in_place_of: Mark | None = None
) -> None:
    """Add names, and this process, to the folder's mark, or to the one that replaces it."""
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    with _exclusive(folder) as locked:
        old = in_place_of or read_mark(folder) or Mark()
        new = Mark(
            old.parts | set(parts),
            None if old.processes is None else old.processes | {this_process()},
            old.files | set(files),
            old.run or uuid.uuid4().hex,
        )
        if new != read_mark_file(folder):
            _write(folder, new, locked)


def merge_mark(folder: Path, other: Path) -> None:
    """Add the mark of ``other`` to that of ``folder``, to which its files are being moved."""
    if (more := read_mark_file(other)) is None:
        return
    with _exclusive(folder) as locked:
        mark = read_mark(folder) or Mark()
        recorded = mark.processes is not None and more.processes is not None
        processes = (mark.processes or frozenset()) | (more.processes or frozenset()) if recorded else None
        _write(folder, Mark(mark.parts | more.parts, processes, mark.files | more.files, more.run or mark.run), locked)


def restore_mark(folder: Path, before: Mark | None) -> None:
    """Restore the mark from before this process wrote to it (None: there was none), unless another process has written
    since."""
    with _exclusive(folder) as locked:
        now = read_mark_file(folder)
        expected = {this_process()} | ((before.processes if before is not None else None) or frozenset())
        if now is None or (now.processes or frozenset()) - expected:
            return
        if before is None:
            (folder / MARK).unlink()
        else:
            _write(folder, before, locked)


def this_process() -> str:
    """``host.pid``, as in TensorBoard's file names."""
    return f"{socket.gethostname()}.{os.getpid()}"


@contextmanager
def _exclusive(folder: Path) -> Iterator[bool]:
    """Let concurrent commands change the mark one after the other. Yields whether the folder is locked, which some file
    systems do not support."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            locked = True
        except OSError:
            locked = False
        yield locked
    finally:
        os.close(descriptor)


def _write(folder: Path, mark: Mark, locked: bool) -> None:
    content = {
        "ibro_lightning": __version__,
        "parts": sorted(mark.parts),
        "processes": None if mark.processes is None else sorted(mark.processes),
        "files": sorted(mark.files),
        "run": mark.run,
    }
    # Without a lock, another process may be writing, too: under separate names the last one wins, with a complete file.
    under = None if locked else folder / f"{MARK}.{os.getpid()}{PARTIAL}"
    with written_atomically(folder / MARK, under) as partial:
        partial.write_text(json.dumps(content, indent=2) + "\n")


def _has_header(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return file.read(len(HEADER)) == HEADER.encode()
    except OSError:
        return False
