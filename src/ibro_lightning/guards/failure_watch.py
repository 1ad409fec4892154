"""Ends all ranks within a bounded time after one of them has failed.

A rank that raises between two collectives leaves the others waiting in the next one: with NCCL until a timeout of many
minutes. Each process therefore has a thread that polls the process group's store once a second, where a failing rank
leaves a note. A process that reads one has a grace period to end with an error of its own or a :class:`RankError`; then
it reports which rank failed, and exits. The failed rank gets a little longer for its clean-up, which may hang in a
collective, too.

A killed process leaves no note. Each process therefore writes heartbeats; the first rank monitors those of all others,
and they monitor the first rank's.
"""

from __future__ import annotations

import sys
import threading
import time
import traceback
from types import TracebackType
from typing import Any, NoReturn

from torch import distributed

from ibro_lightning.errors import RankError, is_lost_connection
from ibro_lightning.guards.printing import tell
from ibro_lightning.guards.signals import leave

_NOTE, _READERS, _ALIVE, _DONE = "ibro/failed", "ibro/failed/readers", "ibro/alive/{}", "done"
LONGEST_NOTE = 500
JOINING_S = 900.0
"""Longest time in seconds until all processes have met; torchrun and SLURM may start them minutes apart."""
STOP_S = 3.0
"""Longest time in seconds to wait for each thread at a normal end."""


class FailureWatch:
    """The watching threads of one process. Does nothing in a run of one process.

    The last process ends at most ``grace_s`` + 5 seconds after a rank has failed. If the rank was killed, and neither a
    closed connection nor the launcher reveals it, ``silence_s`` seconds pass before that.

    Args:
        grace_s: seconds that a process has to end with its own error once a rank has failed.
        silence_s: seconds without a heartbeat after which a process counts as dead.
        period_s: polling interval in seconds.
    """

    def __init__(self, grace_s: float = 15.0, silence_s: float = 120.0, period_s: float = 1.0) -> None:
        self.grace_s, self.silence_s, self.period_s = grace_s, silence_s, period_s
        self._hook: Any = None
        self._threads: list[threading.Thread] = []
        self._reset()

    def _reset(self) -> None:
        self._stopped, self._wake, self._delivered = threading.Event(), threading.Event(), threading.Event()
        self._error: BaseException | None = None
        self._failure: str | None = None
        self._contact = time.monotonic()

    def start(self) -> None:
        """Start the threads, which watch as soon as there is a process group."""
        if self._threads:
            return
        self._reset()
        self._hook, sys.excepthook = sys.excepthook, self._except
        # Two threads, as the one that talks to the store may block forever.
        self._threads = [
            threading.Thread(target=work, name=f"failure-watch-{work.__name__}", daemon=True)
            for work in (self._poll, self._act)
        ]
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """End the watch normally: the other ranks do not miss this one's heartbeats."""
        if not self._threads:
            return
        self._stopped.set()
        self._wake.set()
        for thread in self._threads:
            thread.join(STOP_S)
        self._threads = []
        sys.excepthook = self._hook

    def stop_without_group(self) -> None:
        """End the watch if there is no process group: the command has ended before the ranks met, and this process may
        live on, as in a notebook."""
        if not _in_a_group():
            self.stop()

    def report(self, error: BaseException) -> None:
        """Tell the other ranks that this one fails with ``error``. Returns when all have read the note, or after three
        periods. A :class:`RankError` is not a failure of its own, and the first note stays, as later ones may be
        consequences."""
        if not self._threads or not _in_a_group():
            return
        self._error = error
        self._wake.set()
        # This process may host the store.
        self._delivered.wait(3 * self.period_s)

    def failure_of_another(self) -> str | None:
        """Which other rank failed first, and how, as far as this one knows."""
        if self._failure is None or not _in_a_group():
            return None
        return None if self._failure.startswith(f"rank {distributed.get_rank()} ") else self._failure

    # The thread that talks to the store.

    def _poll(self) -> None:
        while not _in_a_group():
            if self._stopped.is_set():
                return
            self._stopped.wait(self.period_s)
        try:
            # A store's client serves one thread at a time, and may block: this thread has its own.
            group: Any = distributed.distributed_c10d._get_default_store()
            beats = Heartbeats(group.clone(), distributed.get_rank(), distributed.get_world_size(), self.silence_s)
            while True:
                if self._error is not None and not isinstance(self._error, RankError):
                    beats.report(note(beats.rank, self._error))
                if self._failure is None:
                    self._failure = beats.check()
                self._contact = time.monotonic()
                if self._error is not None and beats.all_have_read():
                    self._delivered.set()
                if self._stopped.is_set():
                    beats.store.set(_ALIVE.format(beats.rank), _DONE)  # no more heartbeats after a normal end
                    return
                self._wake.wait(self.period_s / (10 if self._error is not None else 1))
                self._wake.clear()
        except Exception as error:  # the store is gone
            if self._failure is None:
                why = " ".join(str(error).split())[:LONGEST_NOTE]
                self._failure = f"the process that holds the group's store (the first rank, or torchrun) is gone: {why}"

    # The thread that acts.

    def _act(self) -> None:
        began = time.monotonic()
        while not _in_a_group():
            if self._stopped.wait(self.period_s):
                return
            if time.monotonic() - began > JOINING_S:
                tell(f"error: the ranks have not joined within {JOINING_S:g} s: one of them did not start")
                leave(1)
        self._contact = time.monotonic()
        deadline = float("inf")
        while not self._stopped.wait(self.period_s / 2):
            now = time.monotonic()
            if self._failure is None and now - self._contact > self.silence_s:
                self._failure = f"the group's store has not answered for {self.silence_s:g} s: the first rank is gone"
            if self._failure is not None and deadline == float("inf"):
                own = self._error is not None and not isinstance(self._error, RankError)
                deadline = now + self.grace_s + (2.0 if own else 0.0)
            if now >= deadline:
                self._leave()

    def _leave(self) -> NoReturn:
        trace = "".join(traceback.format_exception(self._error)) if self._error is not None else ""
        tell(f"{trace}error: {self._failure} - this is rank {distributed.get_rank()}, which ends with it")
        leave(1)

    def _except(self, kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        self.report(error)
        self._hook(kind, error, trace)
        if failure := self.failure_of_another():
            tell(f"error: {failure}")


class Heartbeats:
    """Notes and heartbeats that processes exchange through the store."""

    def __init__(self, store: Any, rank: int, size: int, silence_s: float) -> None:
        self.store, self.rank, self.size, self.silence_s = store, rank, size, silence_s
        self._count = 0
        self._next = 0.0
        self._has_read = False
        others = [other for other in range(size) if other != rank]
        self._latest = dict.fromkeys(others if rank == 0 else [0], ("", time.monotonic()))

    def check(self) -> str | None:
        """Write a heartbeat and check those of the others. Returns what failed, or None."""
        now = time.monotonic()
        if now >= self._next:
            self._next = now + self.silence_s / 10
            self._count += 1
            self.store.set(_ALIVE.format(self.rank), str(self._count))
            for other in self._silent(now):
                self.report(f"rank {other} has sent no heartbeat for {self.silence_s:g} s: it was killed, or stopped")
        if not self.store.check([_NOTE]):
            return None
        failure: str = self.store.get(_NOTE).decode()
        if not self._has_read:
            self._has_read = True
            self.store.add(_READERS, 1)
        return failure

    def report(self, failure: str) -> None:
        """Leave the note, unless there is one."""
        self.store.compare_set(_NOTE, "", failure)

    def all_have_read(self) -> bool:
        return int(self.store.add(_READERS, 0)) >= self.size

    def _silent(self, now: float) -> list[int]:
        for other, (last, _) in self._latest.items():
            key = _ALIVE.format(other)
            current = self.store.get(key).decode() if self.store.check([key]) else ""
            if current != last or current == _DONE:
                self._latest[other] = (current, now)
        return [other for other, (_, at) in self._latest.items() if now - at > self.silence_s]


def note(rank: int, error: BaseException) -> str:
    """A failure in one line; closed connections mean that another rank was killed."""
    text = " ".join(f"{type(error).__name__}: {error}".split())[:LONGEST_NOTE]
    if is_lost_connection(error):
        return f"rank {rank} lost the connection to another rank, which was killed or has ended: {text}"
    return f"rank {rank} failed: {text}"


def _in_a_group() -> bool:
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1
