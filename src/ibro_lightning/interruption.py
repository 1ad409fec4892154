"""Somebody asked this process to stop: noted at once, acted upon where nothing is lost.

A signal may come at any moment. During generation and rewards an iteration can be abandoned at no loss, as the weights
are still those of the last iteration boundary: there :class:`Interrupted` is raised at once. During an update it waits
for the iteration's end.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class Interrupted(BaseException):
    """The run ends here because it was asked to. Not an ``Exception``: nothing should swallow it on its way out."""


_reason: str | None = None
_abandonable = False


def request(reason: str) -> None:
    """Ask the run to stop; raises :class:`Interrupted` right here if the iteration may be abandoned. For signal
    handlers, which run between two instructions of the main thread."""
    global _reason
    _reason = reason
    if _abandonable:
        raise Interrupted(reason)


def requested() -> str | None:
    """Why the run should stop, or None."""
    return _reason


def clear() -> None:
    """Forget what was asked: a new run begins."""
    global _reason
    _reason = None


@contextmanager
def abandonable() -> Iterator[None]:
    """Work that can be given up at any moment, and is begun only if nobody has asked to stop."""
    global _abandonable
    if _reason is not None:
        raise Interrupted(_reason)
    before, _abandonable = _abandonable, True
    try:
        yield
    finally:
        _abandonable = before
