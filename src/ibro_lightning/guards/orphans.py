"""Processes that Lightning has started end with the one that started them.

If that one is killed before the ranks have met, nothing else tells the others: they would try to reach it for the
half hour that a process group takes to give up.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment

_LAUNCHER = "IBRO_LAUNCHER_PID"
_SET_PARENT_DEATH_SIGNAL = 1


def started_by_lightning() -> bool:
    """Is this a process that another one of the same command has started? torchrun's are not."""
    launched = os.environ.get(_LAUNCHER, str(os.getpid())) != str(os.getpid())
    return launched and "LOCAL_RANK" in os.environ and not TorchElasticEnvironment.detect()


def end_with_launcher() -> None:
    """Have the kernel send SIGTERM to this process when its launcher is gone (Linux; elsewhere nothing happens); in
    the first process, say who that is."""
    if not started_by_lightning():
        os.environ[_LAUNCHER] = str(os.getpid())
        return
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None).prctl(_SET_PARENT_DEATH_SIGNAL, signal.SIGTERM, 0, 0, 0)
    if str(os.getppid()) != os.environ[_LAUNCHER]:  # it was gone before it could be asked for
        raise SystemExit(1)
