"""The trainer's side of the reward pool's processes: the server that forks workers, a worker, and its tasks."""

from __future__ import annotations

import contextlib
import os
import pickle
import select
import socket
import struct
import subprocess
import sys
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection
from typing import Any, cast

from ibro_lightning.errors import ConfigError, RewardError
from ibro_lightning.guards.signals import ended
from ibro_lightning.rewards.pool import server
from ibro_lightning.types import Completion, Prompt

START_S = 120.0
"""Seconds to wait for the server: it imports what the rewards need."""


@dataclass
class Slice:
    """Responses to one prompt, sent to a worker in one message; ``place`` is the position of their results."""

    which: int
    place: int
    offset: int
    prompt: Prompt
    completions: Sequence[Completion]
    deadline_s: float
    crashed: bool = False
    """A worker died while judging its first response: a second time, the response is taken as the cause."""

    def message(self) -> bytes:
        try:
            return pickle.dumps((self.which, self.prompt, self.completions), protocol=pickle.HIGHEST_PROTOCOL)
        except Exception as error:
            reason = f"prompt {self.prompt.id!r} cannot be sent to a worker process ({type(error).__name__}: {error})"
            remedy = "write plain data as its answer and meta, or reward_pool: null"
            raise RewardError(f"reward_pool: {reason}: {remedy}") from error

    def rest(self, count: int, *, crashed: bool = False) -> Iterator[Slice]:
        """The slice without its first ``count`` responses; nothing if none are left."""
        if left := self.completions[count:]:
            yield replace(self, offset=self.offset + count, completions=left, crashed=crashed)

    def singles(self) -> Iterator[Slice]:
        """One slice per response."""
        for index, completion in enumerate(self.completions):
            crashed = self.crashed and index == 0
            yield replace(self, offset=self.offset + index, completions=[completion], crashed=crashed)


@dataclass
class Worker:
    pid: int
    conn: Connection
    slices: deque[Slice] = field(default_factory=deque)
    """The first is being judged; a second may wait behind it."""
    started: float = 0.0
    """When judging of the first slice's first response began."""
    ready: bool = False
    """Whether it has begun to work."""
    judged: int = 0
    """Verdicts that it has given."""

    def __post_init__(self) -> None:
        self._poll = select.poll()  # Connection.poll() makes a new one every time
        self._poll.register(self.conn.fileno(), select.POLLIN)

    @property
    def expires(self) -> float:
        return self.started + self.slices[0].deadline_s

    @property
    def has_message(self) -> bool:
        """Whether there is something to read, or the worker is dead."""
        return bool(self._poll.poll(0))


class ServerDied(Exception):
    """The process that forks workers is gone, and with it all workers."""


class Server:
    """The process that forks workers, as seen from the trainer. See :mod:`.server`."""

    def __init__(self, pickled: bytes, memory_mib: int) -> None:
        self.channel, theirs = socket.socketpair()
        with theirs:
            environment = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "TOKENIZERS_PARALLELISM": "0"}
            environment["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
            self.process = subprocess.Popen(
                [sys.executable, "-c", f"from {server.__name__} import main; main({theirs.fileno()})"],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                start_new_session=True,  # Ctrl-C in the terminal is for the trainer alone
                env=os.environ | environment,
            )
        self.conn = Connection(os.dup(self.channel.fileno()))
        self.conn.send_bytes(pickle.dumps((sys.path, memory_mib, pickled)))
        self.ready = False

    def wait_until_ready(self) -> None:
        if not self.ready:
            if complaint := self._reply(START_S):
                remedy = "fix that, set pooled = False in the reward's class, or write reward_pool: null"
                reason = "a worker process cannot load and preload the rewards"
                raise ConfigError("reward_pool", complaint, f"{reason}: {remedy}")
            self.ready = True

    def fork(self) -> Worker:
        ours, theirs = socket.socketpair()
        # A worker that does not read (suspended from outside, say) must not block the trainer forever.
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", 10, 0))
        with theirs:
            self._send(b"f", 0, [theirs.fileno()])
        return Worker(self._reply(START_S), Connection(ours.detach()))

    def ending(self, worker: Worker) -> int | None:
        """The exit code of a worker that died, or minus the signal's number; None if unknown."""
        self._send(b"w", worker.pid, [])
        return cast(int | None, self._reply(START_S))

    def kill(self, worker: Worker) -> None:
        worker.conn.close()
        self._send(b"k", worker.pid, [])

    def _send(self, command: bytes, pid: int, fds: list[int]) -> None:
        try:
            socket.send_fds(self.channel, [command + pid.to_bytes(8, "big")], fds)
        except OSError as error:
            raise ServerDied from error

    def _reply(self, timeout: float) -> Any:
        try:
            if self.conn.poll(timeout):
                return self.conn.recv()
        except (EOFError, OSError) as error:
            raise ServerDied from error
        raise ServerDied

    def ended(self) -> str:
        """How the process has ended, in words; "" if it is running."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            return ended(self.process.wait(timeout=1))
        return ""

    def close(self) -> None:
        """Close the socket, at which the process ends with all its workers."""
        self.channel.close()
        self.conn.close()
        try:
            self.process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
