"""A rank that fails takes the others with it, within a bounded time.

A rank that raises between two collectives leaves the others waiting in the next one: with NCCL until a timeout of many
minutes. So each process has a thread that looks once a second into the store that the process group was made with.
Whoever fails leaves a note there. A process that reads one has a moment to leave by itself, by an error of its own or
a :class:`RankError`; then it says which rank failed, and ends. The rank that failed is given a little more to finish
its clean-up, which may hang behind a collective, too.

A process that was killed leaves no note. So each gives a sign of life, for which the first rank listens, and all the
others for the first rank's.
"""

from __future__ import annotations

import contextlib
import os
import re
import sys
import threading
import time
import traceback
from types import TracebackType
from typing import Any, NoReturn

from torch import distributed

from ibro_lightning.errors import RankError

_NOTE, _READERS, _ALIVE, _DONE = "ibro/failed", "ibro/failed/readers", "ibro/alive/{}", "done"
LONGEST_NOTE = 500
JOINING_S = 900.0
"""Longest time until all processes have met; torchrun and SLURM may start them minutes apart."""
STOP_S = 3.0
"""Longest time to wait for the store when all is well."""
_LOST = re.compile(r"[Cc]onnection (?:closed|reset|was reset)|Broken pipe|remote process exited")


class FailureWatch:
    """The threads of one process, and its note. Does nothing in a run of one process.

    From the failure of one rank until the last process is gone it takes at most ``grace_s`` and 5 seconds more. If the
    rank was killed and nothing else tells (a closed connection, the launcher), ``silence_s`` come before.

    Args:
        grace_s: seconds for a process to leave by itself, once some rank has failed.
        silence_s: seconds without a sign of life after which a process counts as dead.
        period_s: seconds between two looks.
    """

    def __init__(self, grace_s: float = 15.0, silence_s: float = 120.0, period_s: float = 1.0) -> None:
        self.grace_s, self.silence_s, self.period_s = grace_s, silence_s, period_s
        self._hook: Any = None
        self._threads: list[threading.Thread] = []
        self._stopped, self._wake = threading.Event(), threading.Event()
        self._told = threading.Event()
        self._forget()

    def _forget(self) -> None:
        self._error: BaseException | None = None
        self._known: str | None = None
        self._contact = time.monotonic()
        for event in (self._stopped, self._wake, self._told):
            event.clear()

    def start(self) -> None:
        """Watch from now on, or from the moment on at which there is a process group."""
        if self._threads:
            return
        self._forget()
        self._hook, sys.excepthook = sys.excepthook, self._except
        # Two, as the one that talks to the store may wait for it for ever.
        self._threads = [
            threading.Thread(target=work, name=f"failure-watch-{work.__name__}", daemon=True)
            for work in (self._look, self._judge)
        ]
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """All is well: this process may end without that of another worrying anybody."""
        if not self._threads:
            return
        self._stopped.set()
        self._wake.set()
        for thread in self._threads:
            thread.join(STOP_S)
        self._threads = []
        sys.excepthook = self._hook

    def report(self, error: BaseException) -> None:
        """This rank fails with ``error``: the others must not wait for it. Returns when all have heard, or a moment
        later. A :class:`RankError` is no failure of its own; and the first note stays: what follows it may be its
        consequence."""
        if not self._threads or not _in_a_group():
            return
        self._error = error
        self._wake.set()
        # The store may go away with this process.
        self._told.wait(3 * self.period_s)

    def failure_of_another(self) -> str | None:
        """Which other rank failed first, and how, as far as this one knows."""
        if self._known is None or not _in_a_group():
            return None
        return None if self._known.startswith(f"rank {distributed.get_rank()} ") else self._known

    # The thread that talks to the store.

    def _look(self) -> None:
        while not _in_a_group():
            if self._stopped.is_set():
                return
            self._stopped.wait(self.period_s)
        try:
            # A client serves one thread at a time, and may be waiting: this thread has its own.
            group: Any = distributed.distributed_c10d._get_default_store()
            signs = SignsOfLife(group.clone(), distributed.get_rank(), distributed.get_world_size(), self.silence_s)
            while True:
                if self._error is not None and not isinstance(self._error, RankError):
                    signs.leave_note(self._error)
                if self._known is None:
                    self._known = signs.look()
                self._contact = time.monotonic()
                if self._error is not None and signs.all_have_read():
                    self._told.set()
                if self._stopped.is_set():
                    signs.farewell()
                    return
                self._wake.wait(self.period_s / (10 if self._error is not None else 1))
                self._wake.clear()
        except Exception as error:  # the store is gone
            if self._known is None:
                said = " ".join(str(error).split())[:LONGEST_NOTE]
                self._known = f"the process that holds the group's store (the first rank, or torchrun) is gone: {said}"

    # The thread that acts.

    def _judge(self) -> None:
        began = time.monotonic()
        while not _in_a_group():
            if self._stopped.wait(self.period_s):
                return
            if time.monotonic() - began > JOINING_S:
                sys.stderr.write(f"error: the ranks have not met within {JOINING_S:g} s: one of them did not start\n")
                leave(1)
        self._contact = time.monotonic()
        deadline = float("inf")
        while not self._stopped.wait(self.period_s / 2):
            now = time.monotonic()
            if self._known is None and now - self._contact > self.silence_s:
                self._known = f"the group's store has not answered for {self.silence_s:g} s: the first rank is gone"
            if self._known is not None and deadline == float("inf"):
                own = self._error is not None and not isinstance(self._error, RankError)
                deadline = now + self.grace_s + (2.0 if own else 0.0)
            if now >= deadline:
                self._leave()

    def _leave(self) -> NoReturn:
        said = "".join(traceback.format_exception(self._error)) if self._error is not None else ""
        sys.stderr.write(f"{said}error: {self._known} - this is rank {distributed.get_rank()}, which ends with it\n")
        leave(1)

    def _except(self, kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        self.report(error)
        self._hook(kind, error, trace)
        if known := self.failure_of_another():
            sys.stderr.write(f"error: {known}\n")


def leave(code: int) -> NoReturn:
    """End this process at once, by-passing the interpreter's end: there process groups wait for ranks that are gone, or
    abort."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)


class SignsOfLife:
    """What processes say to each other through the store."""

    def __init__(self, store: Any, rank: int, size: int, silence_s: float) -> None:
        self.store, self.rank, self.size, self.silence_s = store, rank, size, silence_s
        self._count = 0
        self._next = 0.0
        self._has_read = False
        others = [other for other in range(size) if other != rank]
        self._heard = dict.fromkeys(others if rank == 0 else [0], ("", time.monotonic()))

    def leave_note(self, error: BaseException) -> None:
        self.store.compare_set(_NOTE, "", note(self.rank, error))

    def look(self) -> str | None:
        """Give a sign of life and look for those of the others; what failed, or None."""
        now = time.monotonic()
        if now >= self._next:
            self._next = now + self.silence_s / 10
            self._count += 1
            self.store.set(_ALIVE.format(self.rank), str(self._count))
            for other in self._silent(now):
                text = f"rank {other} has given no sign of life for {self.silence_s:g} s: it was killed, or stopped"
                self.store.compare_set(_NOTE, "", text)
        if not self.store.check([_NOTE]):
            return None
        known: str = self.store.get(_NOTE).decode()
        if not self._has_read:
            self._has_read = True
            self.store.add(_READERS, 1)
        return known

    def all_have_read(self) -> bool:
        return int(self.store.add(_READERS, 0)) >= self.size

    def farewell(self) -> None:
        """Others need not worry about the silence that follows."""
        self.store.set(_ALIVE.format(self.rank), _DONE)

    def _silent(self, now: float) -> list[int]:
        for other, (said, _) in self._heard.items():
            key = _ALIVE.format(other)
            says = self.store.get(key).decode() if self.store.check([key]) else ""
            if says != said or says == _DONE:
                self._heard[other] = (says, now)
        return [other for other, (_, heard) in self._heard.items() if now - heard > self.silence_s]


def note(rank: int, error: BaseException) -> str:
    """A failure in one line. What a killed rank leaves behind are closed connections."""
    text = " ".join(f"{type(error).__name__}: {error}".split())[:LONGEST_NOTE]
    if isinstance(error, RuntimeError) and _LOST.search(text):
        return f"rank {rank} lost the connection to another rank, which was killed or has ended: {text}"
    return f"rank {rank} failed: {text}"


def _in_a_group() -> bool:
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1
