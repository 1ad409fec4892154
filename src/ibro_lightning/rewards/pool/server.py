"""The other side of the reward pool: a process that holds the rewards and forks workers, and the work of a worker.

The rewards are unpickled once, here: replacing a worker then costs a fork instead of an import of sympy. This process
runs no reward itself, so no response can hang it. It alone kills and reaps the workers, so no process id is reused
meanwhile; and when the trainer ends, however that happens, it ends all workers.
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
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection
from typing import Any

from ibro_lightning.errors import ConfigError, RewardError
from ibro_lightning.guards import printing
from ibro_lightning.rewards.base import Reward, score
from ibro_lightning.rewards.blame import described
from ibro_lightning.types import RewardResult

PR_SET_PDEATHSIG = 1
MEMORY = "memory"
"""A worker's last message: the reward exceeded the memory limit."""
READY = "ready"
"""A worker's first message: it is waiting for work."""
PATIENCE_S = 0.5
"""Longest wait for a worker's exit status once its connection is closed."""


def serve(channel: socket.socket) -> None:
    """Load the rewards, then fork, kill and reap workers at the pool's request until it is gone."""
    parent = os.getppid()
    conn = Connection(os.dup(channel.fileno()))
    path, memory_mib, pickled = pickle.loads(conn.recv_bytes())
    sys.path[:] = path
    try:
        rewards: list[Reward] = pickle.loads(pickled)
        for reward in rewards:
            reward.preload()
    except BaseException as error:
        conn.send(" ".join(described(error).split()))
        return
    conn.send(None)
    gc.freeze()  # garbage collection in a worker would copy every page that it shares with the others
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
            elif command == b"w":
                conn.send(_ending(pid))
            else:
                _kill(pid)
                workers.discard(pid)
                dying.add(pid)  # reaped later: freeing memory or waiting for a disk may take long
    finally:
        for worker in workers:
            _kill(worker)
        for worker in workers | dying:
            os.waitpid(worker, 0)


def _ending(pid: int) -> int | None:
    """A dead worker's exit code, or minus its signal's number; None if alive or unknown. Does not reap."""
    until = time.monotonic() + PATIENCE_S
    while hasattr(os, "waitid"):
        if ended := os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            return ended.si_status if ended.si_code == os.CLD_EXITED else -ended.si_status
        if time.monotonic() >= until:
            break
        time.sleep(0.005)
    return None


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
        if sys.platform == "linux":
            ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
            if os.getppid() == 1:  # the parent died before
                os._exit(1)
        limit_memory(memory_mib)
        work(Connection(fd), rewards)
        status = 0
    finally:
        os._exit(status)


def limit_memory(mib: int) -> None:
    """Allow this process ``mib`` more of address space than it has now. Linux enforces it, macOS does not."""
    if sys.platform == "linux":
        with open("/proc/self/statm") as file:
            now = int(file.read().split()[0]) * resource.getpagesize()
        _, hard = resource.getrlimit(resource.RLIMIT_AS)
        limit = now + mib * 2**20
        resource.setrlimit(resource.RLIMIT_AS, (limit if hard < 0 else min(limit, hard), hard))


def work(conn: Connection, rewards: Sequence[Reward]) -> None:
    """Judge what arrives, with one message per response (or group), so that the pool knows which one takes how long."""
    conn.send_bytes(pickle.dumps(READY))
    while True:
        try:
            message = conn.recv_bytes()
        except EOFError:
            return
        try:
            which, prompt, completions = pickle.loads(message)
        except Exception as error:
            unread = f"a reward's worker cannot read a prompt ({described(error)}): write plain data as answer and meta"
            conn.send_bytes(pickle.dumps(RewardError(unread)))
            return
        reward = rewards[which]
        for items in [[completion] for completion in completions] if reward.one_by_one else [completions]:
            answer = _judge(reward, prompt, items)
            conn.send_bytes(_packed(answer, reward))
            if answer == MEMORY:
                return  # a process that ran out of memory cannot be trusted


def _packed(answer: object, reward: Reward) -> bytes:
    """A worker's answer as bytes. A result, or a reward's own error, may hold something that cannot be sent."""
    try:
        packed = pickle.dumps(answer)
        if isinstance(answer, BaseException):
            pickle.loads(packed)  # a class with arguments of its own fails only here
    except Exception as error:
        what = described(answer) if isinstance(answer, BaseException) else "a result"
        unsent = f"{type(reward).__name__} gave {what}, which cannot be sent ({described(error)})"
        return pickle.dumps(RewardError(unsent))
    return packed


def _judge(reward: Reward, prompt: Any, completions: Sequence[Any]) -> list[RewardResult] | BaseException | str:
    try:
        return score(reward, prompt, completions)
    except MemoryError:
        return MEMORY
    except (RewardError, ConfigError) as error:
        return error


def main(fd: int) -> None:
    """Serve the pool at the other end of this socket."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the trainer's to handle
    printing.protect()  # so that a reward that prints does not fail for it
    with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):  # the trainer is gone already
        serve(socket.socket(fileno=fd))
