"""The process that holds a lock, as recorded in the lock file."""

from __future__ import annotations

import json
import os
import socket
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path

from ibro_lightning.errors import ConfigError

_KIND = "a lock of ibro_lightning"
START = json.dumps({"file": _KIND})[:-1].encode()
"""How a lock file's content starts, in every version."""


@dataclass(frozen=True)
class Holder:
    """The process that holds a lock, as recorded in the lock file."""

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
    def read(cls, file: int, path: Path) -> tuple[bytes, Holder | None]:
        """``(the file's content, the holder in it)``; no holder if its writer died before or while it wrote.

        Raises:
            ConfigError: the file is not a lock file of this package.
        """
        content = os.pread(file, 4096, 0)
        text = content.strip(b"\0")
        if not text.startswith(START) and not START.startswith(text):
            remedy = "the lock needs this name, and the file is not a lock: move it away, or write another folder"
            raise ConfigError("trainer.default_root_dir", str(path), remedy)
        try:
            fields = json.loads(text)
            names = list(cls.__annotations__)[1:]
            return content, cls(int(fields["pid"]), *(str(fields.get(name, "")) for name in names))
        except (ValueError, TypeError, KeyError):
            return content, None

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
        return json.dumps({"file": _KIND, **asdict(self)}) + "\n"


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
