"""Reports whatever a reward raises as its fault, in one line, except for the user's own request to stop.

``sys.exit`` in a verifier, or in a library that it calls, would otherwise end the run silently with exit code 0.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from ibro_lightning.errors import ConfigError, RewardError
from ibro_lightning.guards import interruption
from ibro_lightning.guards.interruption import Interrupted

STOP_SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))
"""Signals that ask a process to stop."""


@contextmanager
def blamed_on(reward: object, where: str, advice: str = "") -> Iterator[None]:
    """Turn what is raised within, ``SystemExit`` included, into a :class:`RewardError` that names the reward, ``where``
    it was called, and ``advice``.

    Our own errors and MemoryError pass unchanged, and so does what a signal's handler raises (Ctrl-C).
    """
    handlers: dict[int, Callable[[int, FrameType | None], Any]] = {}
    asked = False

    def note(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        asked = True
        handlers[number](number, frame)

    if threading.current_thread() is threading.main_thread():
        for number in STOP_SIGNALS:
            if callable(handler := signal.getsignal(number)):
                handlers[number] = handler
                signal.signal(number, note)
    try:
        yield
    except (RewardError, ConfigError, MemoryError, Interrupted):
        raise
    except BaseException as error:
        if not isinstance(error, Exception):
            if asked or (isinstance(error, KeyboardInterrupt) and interruption.requested() is not None):
                raise
            advice = "a reward must not end the process: have it return a number, or raise an error that says why"
        message = f"{type(reward).__name__} raised {described(error)} ({where})"
        raise RewardError(f"{message} - {advice}" if advice else message) from error
    finally:
        for number, handler in handlers.items():
            if signal.getsignal(number) == note:
                signal.signal(number, handler)


def described(error: BaseException) -> str:
    """``KeyError: 'x'``; the name alone for an error without a text."""
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
