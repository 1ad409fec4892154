"""Ends processes that Lightning has launched together with their launcher.

If the launcher is killed before the ranks have met, the others would not notice: they would try to reach it for the
half hour after which a process group times out.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

_LAUNCHER = "IBRO_LAUNCHER_PID"
_SET_PARENT_DEATH_SIGNAL = 1


def started_by_lightning() -> bool:
    """Whether Lightning launched this process as a further rank of the command; False for torchrun's ranks."""
    launched = os.environ.get(_LAUNCHER, str(os.getpid())) != str(os.getpid())
    return launched and "LOCAL_RANK" in os.environ and "TORCHELASTIC_RUN_ID" not in os.environ


def end_with_launcher() -> None:
    """Have the kernel send SIGTERM to this process when its launcher dies (only on Linux); in the launcher itself,
    record its pid for the others."""
    if not started_by_lightning():
        os.environ[_LAUNCHER] = str(os.getpid())
        return
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None).prctl(_SET_PARENT_DEATH_SIGNAL, signal.SIGTERM, 0, 0, 0)
    if str(os.getppid()) != os.environ[_LAUNCHER]:  # it died before the request
        raise SystemExit(1)
