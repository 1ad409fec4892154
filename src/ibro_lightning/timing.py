"""Wall-clock time by phase, and the phase that is currently running."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

_running: list[tuple[str, float]] = []


def running() -> tuple[str, float] | None:
    """The innermost running phase and its seconds so far; None between phases. Any thread may call this."""
    latest = _running[-1:]  # a single access, as the main thread may leave the phase meanwhile
    return (latest[0][0], time.perf_counter() - latest[0][1]) if latest else None


@contextmanager
def phase(name: str) -> Iterator[float]:
    """Mark ``name`` as running; yields its start time. Phases of other threads run beside one of the main thread, which
    alone is marked."""
    start = time.perf_counter()
    if threading.current_thread() is not threading.main_thread():
        yield start
        return
    _running.append((name, start))
    try:
        yield start
    finally:
        _running.pop()


class PhaseTimer:
    """Sums the seconds spent in named phases.

    >>> timer = PhaseTimer()
    >>> with timer("generate"):
    ...     running()[0]
    'generate'
    >>> list(timer.metrics())
    ['time/generate_s']
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        with phase(name) as start:
            try:
                yield
            finally:
                self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start

    def metrics(self) -> dict[str, float]:
        return {f"time/{name}_s": seconds for name, seconds in self.seconds.items()}
