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

from ibro_lightning.guards.disk import PARTIAL, disk_errors, written_atomically
from ibro_lightning.runs.contents import MARK, PARTS, entry_of, part_of_folder
from ibro_lightning.runs.model_folders import is_own_file
from ibro_lightning.version import __version__

HEADER = "# ibro_lightning"
"""The beginning of a run's ``config.yaml``."""
_EVENTS = re.compile(r"(?:.*/)?events\.out\.tfevents\.\d{10}\.([^/]+\.\d+)\.\d+")


@dataclass(frozen=True)
class Mark:
    """Which files in a run's folder are the run's.

    Args:
        parts: the names that commands claimed before they wrote them (:data:`.contents.PARTS`).
        processes: the processes that have written here, as ``host.pid``, which TensorBoard's file names contain. None
            if the folder is of a version that did not record them.
        files: further files, written by loggers, relative to the folder.
        run: the run's random id, which its rollouts carry, too.
    """

    parts: frozenset[str]
    processes: frozenset[str] | None
    files: frozenset[str] = frozenset()
    run: str = ""

    def owns(self, folder: Path, path: str) -> bool:
        """Whether the run wrote a file.

        Args:
            folder: the run's folder.
            path: the file's, relative to it, with slashes.
        """
        if (events := _EVENTS.fullmatch(path)) and not path.startswith(("evaluations", "earlier.")):
            return events[1] in self.processes if self.processes is not None else "/" not in path
        if path.removesuffix(".partial").removesuffix(".kept") in self.files:
            return True
        entry = entry_of(path)
        if entry is None or not (entry.part in self.parts or entry.part == MARK):
            return False
        return not entry.holds_a_model or is_own_file(folder, path, without_manifest=self.processes is None)

    def owns_folder(self, path: str) -> bool:
        """Whether an empty folder is the run's."""
        return part_of_folder(path) in self.parts


def read_mark(folder: Path) -> Mark | None:
    """The folder's mark; None if it is not a run's folder."""
    if (mark := _read(folder)) is not None:
        return mark
    parts = [part for names in PARTS.values() if _has_header(folder / names[0]) for part in names]
    return replace(EARLIER, parts=frozenset(parts)) if parts else None


NOTHING = Mark(frozenset(), frozenset())
EARLIER = Mark(frozenset(), None, frozenset({"hparams.yaml"}))
"""The mark of a run of a version that wrote none."""


_BEGINS = b'{\n  "ibro_lightning": '
"""The beginning of a mark's content, in every version."""


def _read(folder: Path) -> Mark | None:
    try:
        return _parsed((folder / MARK).read_text())
    except (OSError, ValueError):
        return None


def _parsed(text: str) -> Mark | None:
    try:
        content = json.loads(text)
        processes = content["processes"]
        return Mark(
            frozenset(map(str, content["parts"])),
            None if processes is None else frozenset(map(str, processes)),
            frozenset(map(str, content["files"])),
            str(content.get("run", "")),
        )
    except (ValueError, KeyError, TypeError):
        return None


def has_other_mark(folder: Path) -> bool:
    """Whether a file that is not ours has the mark's name. An incomplete mark is ours: the folder's settings serve as
    one until the next command rewrites it."""
    path = folder / MARK
    if not os.path.lexists(path) or _read(folder) is not None:
        return False
    if path.is_symlink() or not path.is_file():
        return True
    content = path.read_bytes().strip(b"\0")
    return not content.startswith(_BEGINS) and (bool(content) or read_mark(folder) is None)


def write_mark(
    folder: Path, parts: Iterable[str], files: Iterable[str] = (), *, in_place_of: Mark | None = None
) -> None:
    """Add names, and this process, to the folder's mark.

    Args:
        in_place_of: the mark to extend instead of the folder's.
    """
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    with _exclusive(folder) as locked:
        old = in_place_of or read_mark(folder) or NOTHING
        new = Mark(
            old.parts | set(parts),
            None if old.processes is None else old.processes | {this_process()},
            old.files | set(files),
            old.run or uuid.uuid4().hex,
        )
        if new != _read(folder):
            _put(folder, _text(new), locked)


def merge_mark(folder: Path, other: Path) -> None:
    """Add the mark of ``other`` to that of ``folder``, to which its files are being moved."""
    if (more := _read(other)) is None:
        return
    with _exclusive(folder) as locked:
        mark = read_mark(folder) or NOTHING
        both = (mark.processes, more.processes)
        processes = None if None in both else frozenset().union(*(one for one in both if one is not None))
        merged = Mark(mark.parts | more.parts, processes, mark.files | more.files, more.run or mark.run)
        _put(folder, _text(merged), locked)


def mark_text(folder: Path) -> str | None:
    """The text of the folder's mark, for :func:`restore_mark`."""
    return None if (mark := _read(folder)) is None else _text(mark)


def restore_mark(folder: Path, text: str | None) -> None:
    """Restore the mark from before this process wrote to it, unless another process has written since.

    Args:
        text: the earlier :func:`mark_text`; None if there was none.
    """
    with _exclusive(folder) as locked:
        now, then = _read(folder), NOTHING if text is None else _parsed(text) or NOTHING
        if now is None or (now.processes or frozenset()) - {this_process()} - (then.processes or frozenset()):
            return
        if text is None:
            (folder / MARK).unlink()
        else:
            _put(folder, text, locked)


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


def _put(folder: Path, text: str, locked: bool) -> None:
    # Without a lock, another process may be writing, too: under separate names the last one wins, with a whole file.
    under = None if locked else folder / f"{MARK}.{os.getpid()}{PARTIAL}"
    with written_atomically(folder / MARK, under) as partial:
        partial.write_text(text)


def _text(mark: Mark) -> str:
    content = {
        "ibro_lightning": __version__,
        "parts": sorted(mark.parts),
        "processes": None if mark.processes is None else sorted(mark.processes),
        "files": sorted(mark.files),
        "run": mark.run,
    }
    return json.dumps(content, indent=2) + "\n"


def _has_header(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return file.read(len(HEADER)) == HEADER.encode()
    except OSError:
        return False
