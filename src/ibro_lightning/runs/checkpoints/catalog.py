"""Which checkpoints a folder holds, and which of them its run wrote: names alone prove nothing.

``checkpoints/written.txt`` has the run's random id, which its checkpoints carry, too, and a line for each checkpoint: a
fingerprint of its content, and its name. The line is written before the checkpoint gets its name, so even a killed run
recognises its own. In a folder without such lines (of an earlier version, or made by hand), a run may resume from any
checkpoint, and none is removed.
"""

from __future__ import annotations

import hashlib
import re
import uuid
import zipfile
from collections.abc import Iterable
from pathlib import Path

from lightning.pytorch.utilities import rank_zero_warn

from ibro_lightning.guards.disk import written_atomically
from ibro_lightning.runs.checkpoints.index import ABOUT, read_all_but_tensors
from ibro_lightning.runs.checkpoints.manifest import MANIFEST
from ibro_lightning.runs.checkpoints.validity import why_invalid, why_known_invalid

WRITTEN = "written.txt"
HEADER = "# Checkpoints of this run. Others that lie here are not touched."
RUN, WROTE, FROM = "run", "wrote", "from"
"""The run's id; a checkpoint that it wrote; one from which it resumed without having written it: never removed."""

_NAME = re.compile(r"iteration_(\d{6,})\.ckpt")
_Entry = tuple[str, str, str]


class Written:
    """The list of the checkpoints in a run's ``checkpoints/``, as it was when this object was constructed."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / WRITTEN
        self._entries = _read(self.path)

    @property
    def run_id(self) -> str:
        """The run's random id, created on first use."""
        if (run_id := self._recorded_id()) is None:
            run_id = uuid.uuid4().hex
            self._write([(RUN, run_id, "-"), *self._entries])
        return run_id

    def wrote(self, path: Path) -> bool:
        """Whether this run wrote the present content of ``path``."""
        return (WROTE, fingerprint(path), path.name) in self._entries

    def lists(self, path: Path) -> bool:
        """Whether this run wrote, or resumed from, the present content of ``path``."""
        return (fingerprint(path), path.name) in {(content, name) for _, content, name in self._entries}

    def has_name(self, path: Path) -> bool:
        """Whether this run wrote a checkpoint of that name, whatever its present content."""
        return any(kind == WROTE and name == path.name for kind, _, name in self._entries)

    def why_foreign(self, path: Path) -> str | None:
        """Why a valid checkpoint is not of this run, in a few words; None if it is, or if the list is empty. One that
        was changed or copied here is still of this run, though the run no longer removes it."""
        if all(kind == RUN for kind, _, _ in self._entries) or self.lists(path):
            return None
        about = read_all_but_tensors(path).get(ABOUT)
        run_id = self._recorded_id()
        if run_id is not None and isinstance(about, dict) and about.get("run_id") == run_id:
            return None
        return f"it is not of this run ({WRITTEN} beside it does not list it): to resume from it, write its path"

    def add(self, content: Path, name: str, kind: str = WROTE) -> None:
        """List ``content`` as the present or future checkpoint ``name``. An earlier checkpoint of that name stays
        listed until :meth:`tidy`."""
        if (found := fingerprint(content)) is not None and (kind, found, name) not in self._entries:
            self._write([*self._entries, (kind, found, name)])

    def tidy(self, newest: Path | None = None) -> None:
        """Delist checkpoints that no longer exist, and earlier ones with the name of ``newest``."""
        entries = [entry for entry in self._entries if entry[0] == RUN or self.path.with_name(entry[2]).exists()]
        if newest is not None and (found := fingerprint(newest)) is not None:
            entries = [entry for entry in entries if entry[2] != newest.name or entry[1] == found]
        if entries != self._entries:
            self._write(entries)

    def _recorded_id(self) -> str | None:
        return next((content for kind, content, _ in self._entries if kind == RUN), None)

    def _write(self, entries: Iterable[_Entry]) -> None:
        self._entries = sorted(entries, key=lambda entry: (entry[2], entry))
        with written_atomically(self.path) as partial:
            partial.write_text(_text(self._entries))


def checkpoint_name(iteration: int) -> str:
    return f"iteration_{iteration:06d}.ckpt"


def iteration_of(path: Path) -> int | None:
    """The iteration in a checkpoint's name; None for other names."""
    match = _NAME.fullmatch(path.name)
    return int(match[1]) if match else None


def checkpoints_in(folder: Path) -> list[Path]:
    """All paths with a checkpoint's name, valid or not, the newest first."""
    if not folder.is_dir():
        return []
    found = [(iteration, path) for path in folder.iterdir() if (iteration := iteration_of(path)) is not None]
    return [path for _, path in sorted(found, reverse=True)]


def newest_valid(folder: Path) -> tuple[Path | None, dict[Path, str]]:
    """``(the newest checkpoint that is valid and not of another run, or None; why each newer one is not)``."""
    passed_over: dict[Path, str] = {}
    written = Written(folder)
    for path in checkpoints_in(folder):
        if (reason := why_invalid(path) or written.why_foreign(path)) is None:
            return path, passed_over
        passed_over[path] = reason
    return None, passed_over


def newer_valid(checkpoint: Path) -> Path | None:
    """The newest valid checkpoint in the same folder that follows this one in the run's history, if any."""
    written, after = Written(checkpoint.parent), iteration_of(checkpoint)
    for path in checkpoints_in(checkpoint.parent):
        if (iteration_of(path) or 0) <= (after or 0) and after is not None:
            return None
        if why_known_invalid(path) is None and written.why_foreign(path) is None:
            return path
    return None


def fingerprint(path: Path) -> str | None:
    """Identifies a checkpoint's content without reading it: a digest of its parts' checksums. None if there are none,
    as in half a file."""
    try:
        if path.is_dir():
            return _short_digest((path / MANIFEST).read_bytes())
        with zipfile.ZipFile(path) as parts:
            sums = [f"{part.filename} {part.file_size} {part.CRC:08x}" for part in parts.infolist()]
        return _short_digest("\n".join(sums).encode())
    except Exception:  # a damaged file can make zipfile raise anything
        return None


def _read(path: Path) -> list[_Entry]:
    """The list's entries; empty if it is missing or damaged."""
    try:
        text = path.read_text()
        entries = [(kind, content, name) for kind, content, name in (line.split() for line in text.splitlines()[1:-1])]
    except FileNotFoundError:
        return []
    except (OSError, ValueError):
        text, entries = "", []
    if not text or text != _text(entries):
        rank_zero_warn(f"{path} is damaged: any of the checkpoints there may be of this run")
        return []
    return entries


def _text(entries: Iterable[_Entry]) -> str:
    lines = [HEADER, *(" ".join(entry) for entry in entries)]
    return "\n".join([*lines, _short_digest("\n".join(lines).encode())]) + "\n"


def _short_digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:32]
