"""What Ctrl-C, ``kill`` and a lost terminal do to a process, from its start to its end.

While a run trains or evaluates, :class:`.Interruptions` handles signals, and no work is lost. Before and after, and in
commands without a Trainer, there is nothing to lose, and the process ends at once. The exit code is always 128 + the
signal's number, without a traceback. Imports only the standard library, as it runs first.
"""

from __future__ import annotations

import _thread
import atexit
import ctypes
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, NoReturn

from ibro_lightning.guards import interruption
from ibro_lightning.guards.interruption import Interrupted
from ibro_lightning.guards.printing import tell_now

AT_ONCE_S = 5.0
"""Longest time in seconds for a clean-up after a second Ctrl-C."""
CTRL_C = 128 + signal.SIGINT
"""Exit code after Ctrl-C."""

_LAUNCHER = "IBRO_LAUNCHER_PID"
_SET_PARENT_DEATH_SIGNAL = 1
_owns_process = False
_handled_at = -math.inf
"""When a handler last ran: Python runs none while the main thread waits in C code."""
_LAG_S = 1.0
"""How many seconds a handler may run before the watching thread learns of the same signal."""


def stop_signals() -> list[signal.Signals]:
    """The signals that ask a run to stop; SIGHUP only if it is not ignored, as under ``nohup``."""
    found = [signal.SIGINT, signal.SIGTERM]
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
        found.append(signal.SIGHUP)
    return found


def leave(code: int) -> NoReturn:
    """End this process at once, bypassing the interpreter's shutdown, which may wait for threads or for dead ranks."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(Exception):
            stream.flush()
    os._exit(code)


def begin() -> None:
    """Install handlers that end the process at once, for the time of its imports. The command line calls this first."""
    global _owns_process
    _owns_process = True
    # Registered first, so called last: after it Python restores the default handlers, which kill.
    atexit.register(lambda: _set(dict.fromkeys(stop_signals(), signal.SIG_IGN)))
    sys.unraisablehook = _quiet(sys.unraisablehook)

    def handle(number: int, frame: object) -> None:
        tell_now(f"\n{signal.Signals(number).name}: stopped before the command started")
        leave(exit_code(128 + number))

    handle.ends_at_once = True  # type: ignore[attr-defined]
    _set(dict.fromkeys(stop_signals(), handle))
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    os.register_at_fork(after_in_child=_forget)
    _thread.start_new_thread(_watch, (reader,))


def end(code: int) -> None:
    """Keep signals from changing the exit code of a finished command. Ctrl-C ends a slow interpreter shutdown at once:
    the second one, as the first may have been meant for the run."""
    again = code >= 128

    def handle(number: int, frame: object) -> None:
        nonlocal again
        record_handled()
        if again:
            leave(code)
        again = True
        tell_now(f"\n{signal.Signals(number).name}: the command is done and about to exit; Ctrl-C exits at once")

    _set(dict.fromkeys(stop_signals(), handle))


@contextmanager
def raised() -> Iterator[None]:
    """Context in which a signal raises :class:`.Interrupted`, and a second Ctrl-C ends the process at once."""
    asked = False

    def handle(number: int, frame: object) -> None:
        nonlocal asked
        record_handled()
        again, asked = asked, True
        if not again:
            raise Interrupted(signal.Signals(number).name, 128 + number)
        if number == signal.SIGINT:
            at_once()

    handle.ends_at_once = True  # type: ignore[attr-defined]
    before = _set(dict.fromkeys(stop_signals(), handle))
    try:
        yield
    finally:
        _set(before)


@contextmanager
def held_back() -> Iterator[Callable[[], None]]:
    """Context in which signals wait for its end, or for a call of the function that it gives: for a library that an
    exception in its midst would leave half done. A second Ctrl-C does not wait."""
    waiting: list[int] = []

    def handle(number: int, frame: object) -> None:
        if number != signal.SIGINT or number not in waiting:
            waiting.append(number)
        else:
            hand_over(number)

    def hand_over(number: int) -> None:
        _set({number: before[number]})
        try:
            signal.raise_signal(number)
        finally:
            _set({number: handle})

    def let_through() -> None:
        while waiting:
            hand_over(waiting.pop(0))

    before = _set(dict.fromkeys(stop_signals(), handle))
    try:
        yield let_through
    finally:
        _set(before)
        for number in waiting:
            signal.raise_signal(number)


def at_once(before: Callable[[], None] = lambda: None) -> NoReturn:
    """React to a second Ctrl-C: call ``before``, which ends other processes, raise ``KeyboardInterrupt``, and end the
    process after :data:`AT_ONCE_S` seconds even if that is swallowed or a clean-up hangs."""
    before()
    if _owns_process:  # _thread, as the signal may have come while threading held its locks
        _thread.start_new_thread(_leave_soon, ())
    raise KeyboardInterrupt


def record_handled() -> None:
    """Record, in a handler, that the signal is being handled."""
    global _handled_at
    _handled_at = time.monotonic()


def exit_code(code: int) -> int:
    """``code``, or 0 in a process that Lightning launched: if such a process ends with another code, Lightning kills
    all others, which may be saving."""
    return 0 if started_by_lightning() else code


def started_by_lightning() -> bool:
    """Whether Lightning launched this process as a further rank of the command; False for torchrun's ranks."""
    launched = os.environ.get(_LAUNCHER, str(os.getpid())) != str(os.getpid())
    return launched and "LOCAL_RANK" in os.environ and "TORCHELASTIC_RUN_ID" not in os.environ


def end_with_launcher() -> None:
    """Have the kernel send SIGTERM to this process when its launcher dies (only on Linux); in the launcher itself,
    record its pid for the others. Without this, processes whose launcher is killed before the ranks have met would try
    to reach it for the half hour after which a process group times out."""
    if not started_by_lightning():
        os.environ[_LAUNCHER] = str(os.getpid())
        return
    end_with(int(os.environ[_LAUNCHER]), signal.SIGTERM)


def end_with(parent: int, number: int) -> None:
    """Have the kernel send signal ``number`` to this process when its ``parent`` ends, or the thread of it that started
    this process (only on Linux)."""
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None).prctl(_SET_PARENT_DEATH_SIGNAL, number, 0, 0, 0)
    if os.getppid() != parent:  # it ended before the request
        raise SystemExit(1)


def ended(code: int | None) -> str:
    """How a process ended, in words.

    >>> ended(-9), ended(3), ended(None)
    ('signal SIGKILL', 'exit code 3', 'a closed connection')
    """
    if code is None:
        return "a closed connection"
    if code >= 0:
        return f"exit code {code}"
    try:
        return f"signal {signal.Signals(-code).name}"
    except ValueError:
        return f"signal {-code}"


def _watch(reader: int) -> None:
    """Thread that receives signals at once, and ends the process if the main thread waits in C code, for example for
    other ranks or a file server."""
    count = 0
    while numbers := os.read(reader, 64):
        for number in filter(stop_signals().__contains__, numbers):
            count += 1
            # What Interruptions requested may take its time, but a second Ctrl-C may not.
            if getattr(signal.getsignal(number), "ends_at_once", False) or (number == signal.SIGINT and count > 1):
                _thread.start_new_thread(_insist, (number, time.monotonic()))


def _insist(number: int, since: float) -> None:
    time.sleep(AT_ONCE_S)
    if _handled_at < since - _LAG_S:
        tell_now(f"\n{signal.Signals(number).name}: stopped")
        leave(exit_code(128 + number))


def _forget() -> None:
    """Restore the default handlers in a forked process."""
    signal.set_wakeup_fd(-1)
    _set(dict.fromkeys(stop_signals(), signal.SIG_DFL) | {signal.SIGINT: signal.default_int_handler})


def _leave_soon() -> None:
    time.sleep(AT_ONCE_S)
    leave(exit_code(CTRL_C))


def _set(handlers: dict[int, Any]) -> dict[int, Any]:
    """Install handlers and return the previous ones. Only the main thread can; in others this does nothing."""
    if threading.current_thread() is not threading.main_thread():
        return {}
    return {
        number: signal.signal(number, handler)
        for number, handler in handlers.items()
        if handler is not None  # None: it was not installed by Python
    }


def _quiet(hook: Any) -> Any:
    """An ``unraisablehook`` without tracebacks for signals that raised in a destructor, which Python ignores.
    :mod:`.interruption` has recorded the request, except for one before the Trainer's setup: that ends the process."""

    def handle(unraisable: Any) -> None:
        if not isinstance(unraisable.exc_value, Interrupted | KeyboardInterrupt):
            hook(unraisable)
        elif interruption.requested() is None:
            leave(exit_code(getattr(unraisable.exc_value, "exit_code", CTRL_C)))

    return handle
