"""The far side of the reward pool: a process that holds the rewards and forks workers, and what a worker does.

The rewards are unpickled once, here, so that replacing a worker costs a fork of a few milliseconds and not the import
of sympy. This process runs no reward itself, so nothing a response says can hang it. It is the parent of all workers:
it alone kills and reaps them, so a process id is never used for another process meanwhile, and when the trainer goes
away, however it ends, it takes all workers with it.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import pickle
import resource
import select
import signal
import socket
import sys
from collections.abc import Sequence
from multiprocessing.connection import Connection
from typing import Any

from ibro_lightning.errors import ConfigError, RewardError
from ibro_lightning.responses import RewardResult
from ibro_lightning.rewards.base import Reward, score

PR_SET_PDEATHSIG = 1
MEMORY = "memory"
"""A worker's last words: the reward ran into the memory limit."""


def serve(channel: socket.socket) -> None:
    """Load the rewards, then fork, kill and reap workers as the pool asks, until it is gone."""
    parent = os.getppid()
    conn = Connection(os.dup(channel.fileno()))
    path, memory_mib, pickled = pickle.loads(conn.recv_bytes())
    sys.path[:] = path
    try:
        rewards: list[Reward] = pickle.loads(pickled)
        for reward in rewards:
            reward.preload()
    except BaseException as error:
        conn.send(" ".join(f"{type(error).__name__}: {error}".split()))
        return
    conn.send(None)
    gc.freeze()  # a collection in a worker would copy every page that it shares with the others
    workers: set[int] = set()
    dying: set[int] = set()
    try:
        while os.getppid() == parent:
            asked = select.select([channel], [], [], 0.02 if dying else 1.0)[0]
            dying = {pid for pid in dying if os.waitpid(pid, os.WNOHANG)[0] == 0}
            if not asked:
                continue
            request, fds, _, _ = socket.recv_fds(channel, 9, 1)
            if not request:
                return
            command, pid = request[:1], int.from_bytes(request[1:], "big")
            if command == b"f":
                worker = _fork(rewards, fds[0], memory_mib, [channel.fileno(), conn.fileno()])
                os.close(fds[0])
                workers.add(worker)
                conn.send(worker)
            else:
                _kill(pid)
                workers.discard(pid)
                dying.add(pid)  # which may take its time (memory to free, a disk to wait for), and nobody else's
    finally:
        for worker in workers:
            _kill(worker)
        for worker in workers | dying:
            os.waitpid(worker, 0)


def _kill(pid: int) -> None:
    """End a worker with everything it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def _fork(rewards: Sequence[Reward], fd: int, memory_mib: int, close: Sequence[int]) -> int:
    if pid := os.fork():
        with contextlib.suppress(OSError):
            os.setpgid(pid, pid)
        return pid
    status = 1
    try:
        with contextlib.suppress(OSError):
            os.setpgid(0, 0)
        for other in close:
            os.close(other)
        _die_with_parent()
        limit_memory(memory_mib)
        work(Connection(fd), rewards)
        status = 0
    finally:
        os._exit(status)


def _die_with_parent() -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() == 1:
            os._exit(1)


def limit_memory(mib: int) -> None:
    """Allow this process ``mib`` more of address space than it has now. Linux keeps to it, macOS does not."""
    if sys.platform == "linux":
        with open("/proc/self/statm") as file:
            now = int(file.read().split()[0]) * resource.getpagesize()
        _, hard = resource.getrlimit(resource.RLIMIT_AS)
        limit = now + mib * 2**20
        resource.setrlimit(resource.RLIMIT_AS, (limit if hard < 0 else min(limit, hard), hard))


def work(conn: Connection, rewards: Sequence[Reward]) -> None:
    """Judge what arrives; one message per response (or per group) the moment it is judged, so that the pool knows at
    any time which one is being worked on, and since when."""
    while True:
        try:
            which, prompt, completions = pickle.loads(conn.recv_bytes())
        except EOFError:
            return
        reward = rewards[which]
        for items in [[completion] for completion in completions] if reward.one_by_one else [completions]:
            said = _judge(reward, prompt, items)
            conn.send_bytes(pickle.dumps(said))
            if said == MEMORY:
                return  # what is left of a process that ran out of memory is not worth trusting


def _judge(reward: Reward, prompt: Any, completions: Sequence[Any]) -> list[RewardResult] | BaseException | str:
    try:
        return score(reward, prompt, completions)
    except MemoryError:
        return MEMORY
    except (RewardError, ConfigError) as error:
        return error
    except BaseException as error:  # SystemExit and its like; the pool raises it where the user can see it
        name = type(reward).__name__
        return RewardError(f"data.reward: {name} raised {type(error).__name__}: {error} (prompt {prompt.id!r})")


def main(fd: int) -> None:
    """Serve the pool at the other end of this socket."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the trainer's to handle
    with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):  # the trainer is gone already
        serve(socket.socket(fileno=fd))
