"""Engine processes forked from the process that starts them, which has imported what they need: a fresh Python takes
several CPU seconds to import it. That an engine's process starts fresh is shown in test_engine_process.py."""

from __future__ import annotations

import ctypes
import gc
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any, NoReturn

import psutil
import pytest

from ibro_lightning.engines import process

NAME = "process_child"
"""By which the forked process is known, as the fresh one is by its command."""
_SET_NAME = 15  # prctl's PR_SET_NAME


class Forked(subprocess.Popen[bytes]):
    """``Popen([sys.executable, "-c", code], …)``; what the code does and how the process ends is the same."""

    def _execute_child(self, args: Sequence[str], *settings: Any) -> None:
        pass_fds, env, pipes = settings[3], settings[5], settings[9:15]
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        if self.pid == 0:
            _run(args[-1], pass_fds, env)
        self._child_created = True
        self._close_pipe_fds(*pipes)  # type: ignore[attr-defined]


def _run(code: str, pass_fds: Sequence[int], env: Mapping[str, str]) -> NoReturn:
    status = 1
    try:
        gc.disable()  # a collection would copy every page that is shared with the parent
        signal.set_wakeup_fd(-1)
        ctypes.CDLL(None).prctl(_SET_NAME, NAME.encode(), 0, 0, 0)
        os.setsid()
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        kept = sorted({0, 1, 2, *pass_fds})
        for before, after in zip(kept, [*kept[1:], os.sysconf("SC_OPEN_MAX")], strict=True):
            os.closerange(before + 1, after)
        os.environ.clear()
        os.environ.update(env)
        exec(code, {})
        status = 0
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else 1
    except BaseException as error:
        sys.excepthook(type(error), error, error.__traceback__)
    finally:
        os._exit(status)


def fork_engines(monkeypatch: pytest.MonkeyPatch | None = None) -> None:
    """Have :class:`.EngineProcess` fork; without ``monkeypatch``, to the end of this process."""
    own = SimpleNamespace(**{**vars(subprocess), "Popen": Forked})
    if monkeypatch is None:
        process.subprocess = own  # type: ignore[assignment]
    else:
        monkeypatch.setattr(process, "subprocess", own)


def engine_processes(parent: int | None = None) -> list[psutil.Process]:
    """The engines' processes that this process, or ``parent``, has started."""
    children = psutil.Process(parent).children()
    return [child for child in children if NAME in child.name() or NAME in " ".join(child.cmdline())]
