"""Requests to stop this process: recorded at once, and carried out where no work is lost.

A signal may come at any moment. During generation and rewards an iteration can be abandoned without loss, as the
weights are still those of the last iteration boundary: there :class:`Interrupted` is raised at once. During an update
it waits for the end of the iteration.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

EXIT_CODE = 128 + signal.SIGTERM
"""Exit code of a run that was asked to stop, where the signal is unknown."""


class Interrupted(BaseException):
    """Ends a run that was asked to stop. Not an ``Exception``, so that no handler swallows it.

    Args:
        reason: for messages, such as "SIGTERM".
        exit_code: the process's: 128 + the signal's number, the convention of shells and job schedulers.
    """

    def __init__(self, reason: str, exit_code: int = EXIT_CODE) -> None:
        super().__init__(reason)
        self.exit_code = exit_code
        self.is_reported = False
        """Whether the end of the run has been reported."""


_request: tuple[str, int] | None = None
_abandonable = False


def request(reason: str, exit_code: int = EXIT_CODE) -> None:
    """Ask the run to stop; raises :class:`Interrupted` right here if the iteration may be abandoned. For signal
    handlers, which run between two instructions of the main thread. Only the first request counts."""
    global _request, _abandonable
    if _request is None:
        _request = (reason, exit_code)
    if _abandonable:
        _abandonable = False  # only once: another signal must not interrupt the handling of the first
        raise Interrupted(*_request)


def requested() -> str | None:
    """Why the run should stop, or None."""
    return None if _request is None else _request[0]


def check() -> None:
    """Raise :class:`Interrupted` if a stop was requested."""
    if _request is not None:
        raise Interrupted(*_request)


def clear() -> None:
    """Forget the request: a new run begins, or the request was carried out."""
    global _request
    _request = None


@contextmanager
def abandonable() -> Iterator[None]:
    """Context for work that can be abandoned at any moment. Raises :class:`Interrupted` if a stop was requested before
    or is requested within it. Signals reach the main thread alone: what another thread does here is not abandoned."""
    global _abandonable
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before, _abandonable = _abandonable, True
    try:
        check()  # only now, so that no signal is missed in between
        yield
        check()  # an exception that a signal handler raised within a destructor or a C callback is lost
    finally:
        _abandonable = before and _request is None
