"""Python processes forked from the process that starts them, which has imported what they need: a fresh one takes
several CPU seconds to import it. That an engine's process starts fresh is shown in test_engine_process.py."""

from __future__ import annotations

import ctypes
import gc
import os
import runpy
import signal
import subprocess
import sys
from collections.abc import Sequence
from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple, NoReturn

import psutil
import pytest

from ibro_lightning.engines import process

NAME = "process_child"
"""By which an engine's forked process is known, as a fresh one is by its command."""
_SET_NAME = 15  # prctl's PR_SET_NAME


class _Settings(NamedTuple):
    """What ``subprocess.Popen`` hands its ``_execute_child`` beside the arguments."""

    executable: Any
    preexec_fn: Any
    close_fds: Any
    pass_fds: Sequence[int]
    cwd: Any
    env: Any
    startupinfo: Any
    creationflags: Any
    shell: Any
    p2cread: int
    p2cwrite: int
    c2pread: int
    c2pwrite: int
    errread: int
    errwrite: int
    restore_signals: Any
    gid: Any
    gids: Any
    uid: Any
    umask: Any
    start_new_session: bool
    process_group: Any


class Forked(subprocess.Popen[Any]):
    """``Popen([sys.executable, …], …)``; what the code does and how the process ends is the same."""

    def _execute_child(self, args: Sequence[str], *rest: Any) -> None:
        settings = _Settings(*rest)
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        if self.pid == 0:
            _run([str(arg) for arg in args[1:]], settings)
        self._child_created = True
        self._close_pipe_fds(*settings[9:15])  # type: ignore[attr-defined]


def run(command: Sequence[str], **settings: Any) -> subprocess.CompletedProcess[Any]:
    """``subprocess.run`` without input."""
    with Forked(command, **settings) as forked:
        out, err = forked.communicate()
    return subprocess.CompletedProcess(command, forked.returncode, out, err)


def _run(args: Sequence[str], settings: _Settings) -> NoReturn:
    status = 1
    try:
        gc.disable()  # a collection would copy every page that is shared with the parent
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if settings.start_new_session:
            os.setsid()
        for target, source in enumerate((settings.p2cread, settings.c2pwrite, settings.errwrite)):
            if source != -1:
                os.dup2(source, target)
        kept = sorted({0, 1, 2, *settings.pass_fds})
        for before, after in zip(kept, [*kept[1:], os.sysconf("SC_OPEN_MAX")], strict=True):
            os.closerange(before + 1, after)
        sys.stdin, sys.stdout, sys.stderr = (os.fdopen(number, "rw"[number > 0], closefd=False) for number in range(3))
        if settings.cwd is not None:
            os.chdir(settings.cwd)
        if settings.env is not None:
            os.environ.clear()
            os.environ.update(settings.env)
        sys.path[:0] = [os.getcwd(), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
        _execute(args)
        status = 0
    except SystemExit as error:
        if isinstance(error.code, str):
            print(error.code, file=sys.stderr)
        status = error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException as error:
        sys.excepthook(type(error), error, error.__traceback__)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _execute(args: Sequence[str]) -> None:
    if args[0] == "-c":
        sys.argv = ["-c", *args[2:]]
        if process.process_child.__name__ in args[1]:
            ctypes.CDLL(None).prctl(_SET_NAME, NAME.encode(), 0, 0, 0)
        exec(args[1], {"__name__": "__main__"})
    elif args[0] == "-m":
        sys.argv = list(args[1:])
        runpy.run_module(args[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = list(args)
        runpy.run_path(args[0], run_name="__main__")


def fork_from(module: ModuleType, monkeypatch: pytest.MonkeyPatch | None = None) -> None:
    """Have a module that starts Python through ``subprocess.Popen`` fork; without ``monkeypatch``, to the end of this
    process."""
    own = SimpleNamespace(**{**vars(subprocess), "Popen": Forked})
    if monkeypatch is None:
        module.subprocess = own  # type: ignore[attr-defined]
    else:
        monkeypatch.setattr(module, "subprocess", own)


def fork_engines(monkeypatch: pytest.MonkeyPatch | None = None) -> None:
    """Have :class:`.EngineProcess` fork."""
    fork_from(process, monkeypatch)


def engine_processes(parent: int | None = None) -> list[psutil.Process]:
    """The engines' processes that this process, or ``parent``, has started."""
    children = psutil.Process(parent).children()
    return [child for child in children if NAME in child.name() or NAME in " ".join(child.cmdline())]
