"""The near side of the reward pool's processes: the server that forks workers, a worker, and what it is given."""

from __future__ import annotations

import os
import pickle
import select
import socket
import struct
import subprocess
import sys
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any

from ibro_lightning.errors import ConfigError
from ibro_lightning.responses import Completion, Prompt
from ibro_lightning.rewards.pool import server

START_S = 120.0
"""Seconds to wait for the server: it imports what the rewards need."""


@dataclass
class Slice:
    """Some responses to one prompt, sent to a worker together; ``place`` is where their results belong."""

    which: int
    place: int
    offset: int
    prompt: Prompt
    completions: Sequence[Completion]
    deadline_s: float
    crashed: bool = False
    """Its first response was being judged when a worker died: if that happens again, it is the response's doing."""

    def message(self) -> bytes:
        return pickle.dumps((self.which, self.prompt, self.completions), protocol=pickle.HIGHEST_PROTOCOL)

    def rest(self, count: int, *, crashed: bool = False) -> Iterator[Slice]:
        """What is left once the first ``count`` responses are dealt with; nothing, if that is all."""
        if left := self.completions[count:]:
            yield Slice(self.which, self.place, self.offset + count, self.prompt, left, self.deadline_s, crashed)

    def singles(self) -> Iterator[Slice]:
        """Cut up into one slice per response."""
        for index, completion in enumerate(self.completions):
            crashed = self.crashed and index == 0
            place = self.offset + index
            yield Slice(self.which, self.place, place, self.prompt, [completion], self.deadline_s, crashed)


@dataclass
class Worker:
    pid: int
    conn: Connection
    slices: deque[Slice] = field(default_factory=deque)
    """The first one is being judged, a second one may wait behind it."""
    started: float = 0.0
    """When the response at the head of the first slice was begun."""

    def __post_init__(self) -> None:
        self._poll = select.poll()  # Connection.poll() makes a new one every time
        self._poll.register(self.conn.fileno(), select.POLLIN)

    @property
    def expires(self) -> float:
        return self.started + self.slices[0].deadline_s

    @property
    def has_news(self) -> bool:
        """There is something to read, if only that it is dead."""
        return bool(self._poll.poll(0))


class ServerDied(Exception):
    """The process that forks workers is gone, and so are they."""


class Server:
    """The process that forks workers, seen from here. See :mod:`.server`."""

    def __init__(self, pickled: bytes, memory_mib: int) -> None:
        self.channel, theirs = socket.socketpair()
        with theirs:
            environment = os.environ | {
                "OMP_NUM_THREADS": "1",
                "CUDA_VISIBLE_DEVICES": "",
                "TOKENIZERS_PARALLELISM": "0",
            }
            self.process = subprocess.Popen(
                [sys.executable, "-c", f"from {server.__name__} import main; main({theirs.fileno()})"],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                start_new_session=True,  # Ctrl-C in the terminal is for the trainer alone
                env=environment | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            )
        self.conn = Connection(os.dup(self.channel.fileno()))
        self.conn.send_bytes(pickle.dumps((sys.path, memory_mib, pickled)))
        self.ready = False

    def wait_until_ready(self) -> None:
        if not self.ready:
            if complaint := self._reply(START_S):
                raise ConfigError(
                    "data.reward_pool",
                    complaint,
                    "a worker process cannot load and preload the rewards: mend that, set pooled = False in the "
                    "reward's class, or write data.reward_pool: null",
                )
            self.ready = True

    def fork(self) -> Worker:
        ours, theirs = socket.socketpair()
        # A worker that does not read (it was stopped from outside, say) must not hold up the trainer for ever.
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", 10, 0))
        with theirs:
            self._send(b"f", 0, [theirs.fileno()])
        return Worker(self._reply(START_S), Connection(ours.detach()))

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

    def close(self) -> None:
        """It ends, with all its workers, when its socket does."""
        self.channel.close()
        self.conn.close()
        try:
            self.process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
