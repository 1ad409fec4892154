"""Reports whatever a reward raises as its fault, in one line, except for the user's own request to stop.

``sys.exit`` in a verifier, or in a library that it calls, would otherwise end the run silently with exit code 0.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any, Self

from ibro_lightning.errors import ConfigError, RewardError
from ibro_lightning.guards import interruption
from ibro_lightning.guards.interruption import Interrupted

STOP_SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))
"""Signals that ask a process to stop."""


class blamed_on:
    """Turn what is raised within, ``SystemExit`` included, into a :class:`RewardError` that names the reward,
    ``where`` it was called, and ``advice``.

    Our own errors and MemoryError pass unchanged, and so does what a signal's handler raises (Ctrl-C). A class, because
    ``contextlib.contextmanager`` lets a StopIteration through if a RuntimeError, such as ours, is raised from it.
    """

    def __init__(self, reward: object, where: str, advice: str = "") -> None:
        self._name, self._where, self._advice = type(reward).__name__, where, advice
        self._before: dict[int, Callable[[int, FrameType | None], Any]] = {}
        self._asked = False

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in STOP_SIGNALS:
                if callable(handler := signal.getsignal(number)):
                    self._before[number] = handler
                    signal.signal(number, self._note)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        for number, handler in self._before.items():
            if signal.getsignal(number) == self._note:
                signal.signal(number, handler)
        if error is None or isinstance(error, RewardError | ConfigError | MemoryError | Interrupted):
            return
        advice = self._advice
        if not isinstance(error, Exception):
            if self._asked or (isinstance(error, KeyboardInterrupt) and interruption.requested() is not None):
                return
            advice = "a reward must not end the process: have it return a number, or raise an error that says why"
        message = f"{self._name} raised {described(error)} ({self._where})"
        raise RewardError(f"{message} - {advice}" if advice else message) from error

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._asked = True
        self._before[number](number, frame)


def described(error: BaseException) -> str:
    """``KeyError: 'x'``; the name alone for an error without a text."""
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
