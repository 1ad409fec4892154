"""The process that holds a lock, as recorded in the lock file."""

from __future__ import annotations

import json
import os
import socket
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path

_KIND = "a lock of ibro_lightning"
_BEGINS = json.dumps({"file": _KIND})[:-1].encode()
"""How a lock file's content begins, in every version."""


@dataclass(frozen=True)
class Holder:
    """The process that holds a lock."""

    pid: int
    host: str
    started: str
    """The process's start time in clock ticks since boot, as pids are reused."""
    since: str
    command: str
    run: str
    """Identifies the run of which the process is a rank (:func:`run_name`)."""

    @classmethod
    def this_process(cls, command: str) -> Holder:
        now = datetime.now().astimezone().isoformat(sep=" ", timespec="seconds")
        return cls(os.getpid(), socket.gethostname(), _started(os.getpid()), now, command, run_name())

    @classmethod
    def parse(cls, content: bytes) -> Holder | None:
        """The holder in a lock file's content; None if it is empty or incomplete, as its writer died while writing.

        Raises:
            ValueError: the file is not a lock file of this package.
        """
        content = content.strip(b"\0")
        if not content.startswith(_BEGINS):
            if not _BEGINS.startswith(content):
                raise ValueError("not a lock's content")
            return None
        try:
            fields = json.loads(content)
            return cls(int(fields["pid"]), *(str(fields.get(name, "")) for name in list(cls.__annotations__)[1:]))
        except (ValueError, TypeError, KeyError):
            return None

    def __str__(self) -> str:
        if not self.pid:
            return f"another process ({self.command})"
        return f"process {self.pid} on {self.host} ({self.command}), since {self.since}"

    def is_here(self) -> bool:
        return self.host == socket.gethostname()

    def is_alive(self) -> bool:
        """Whether the process, which must be on this machine, is running."""
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return False
        except PermissionError:  # another user's
            pass
        return _started(self.pid) in ("", self.started)

    def to_json(self) -> str:
        """The lock file's content; see :meth:`parse`."""
        return json.dumps({"file": _KIND, **asdict(self)}) + "\n"


def is_locks_content(content: bytes) -> bool:
    """Whether this is certainly the content of a lock file, complete or not."""
    return content.strip(b"\0").startswith(_BEGINS)


def run_name() -> str:
    """Identifies this run: environment variables that all its ranks, and no other run's, share."""
    rendezvous = ["MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT"]
    slurm = ["SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_RESTART_COUNT"]
    return "/".join(os.environ.get(name, "") for name in rendezvous + slurm)


def _started(pid: int) -> str:
    """A process's start time in clock ticks since boot; "" where it is not available."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return ""
