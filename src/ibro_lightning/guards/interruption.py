"""Somebody asked this process to stop: noted at once, acted upon where nothing is lost.

A signal may come at any moment. During generation and rewards an iteration can be abandoned at no loss, as the weights
are still those of the last iteration boundary: there :class:`Interrupted` is raised at once. During an update it waits
for the iteration's end.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager

EXIT_CODE = 128 + signal.SIGTERM
"""Of a run that was asked to stop, where nothing says by which signal."""


class Interrupted(BaseException):
    """The run ends here because it was asked to. Not an ``Exception``: nothing should swallow it on its way out.

    Args:
        reason: for people, such as "SIGTERM".
        exit_code: of the process: 128 + the signal's number, as shells and job schedulers know it.
    """

    def __init__(self, reason: str, exit_code: int = EXIT_CODE) -> None:
        super().__init__(reason)
        self.exit_code = exit_code


_wish: tuple[str, int] | None = None
_abandonable = False


def request(reason: str, exit_code: int = EXIT_CODE) -> None:
    """Ask the run to stop; raises :class:`Interrupted` right here if the iteration may be abandoned. For signal
    handlers, which run between two instructions of the main thread. Only the first wish counts."""
    global _wish, _abandonable
    if _wish is None:
        _wish = (reason, exit_code)
    if _abandonable:
        _abandonable = False  # once: another signal must not break into what is done about the first one
        raise Interrupted(*_wish)


def requested() -> str | None:
    """Why the run should stop, or None."""
    return None if _wish is None else _wish[0]


def check() -> None:
    """Raise :class:`Interrupted` if somebody asked."""
    if _wish is not None:
        raise Interrupted(*_wish)


def clear() -> None:
    """Forget what was asked: a new run begins, or the wish was granted."""
    global _wish
    _wish = None


@contextmanager
def abandonable() -> Iterator[None]:
    """Work that can be given up at any moment, and is begun only if nobody has asked to stop. Ends with
    :class:`Interrupted` in any case if somebody asks meanwhile."""
    global _abandonable
    before, _abandonable = _abandonable, True
    try:
        check()  # only now, so that no signal falls between the two
        yield
        check()  # what a signal handler raises within a destructor or a C callback is lost
    finally:
        _abandonable = before and _wish is None
