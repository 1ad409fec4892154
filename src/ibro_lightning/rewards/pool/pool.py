"""Worker processes for rewards: nothing that a response says can hang, exhaust or crash the trainer.

A response that takes longer than its deadline, or more memory than its limit, costs its worker: the worker is killed
and replaced, the response gets a configured score and is counted. Results come in the order of the responses.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import selectors
import time
import weakref
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import cloudpickle

from ibro_lightning.errors import ConfigError, RewardError, check_at_least
from ibro_lightning.responses import RewardResult
from ibro_lightning.rewards.base import Answered, Reward
from ibro_lightning.rewards.combine import judge_here
from ibro_lightning.rewards.pool.processes import Server, ServerDied, Slice, Worker
from ibro_lightning.rewards.pool.server import MEMORY

Stopped = Literal["timeout", "memory", "crash"]
SLICE = 8
"""Responses sent to a worker at once: enough to make a message worth its while, few enough to share the work evenly."""
SMALL = 64 * 2**10
"""Bytes that a socket takes without waiting for its reader. A worker gets its next message early only below this."""
NAP_S = 0.01
"""Longest time for which messages are left to gather: to wake for each of them would take a core from the workers."""
MAX_RESTARTS = 3


@dataclass(frozen=True)
class PoolOptions:
    """How rewards are judged in worker processes.

    Args:
        workers: processes; None takes one per core that this process may use, at most 16.
        deadline_s: seconds that one response may take (for rewards that compare the responses of a group: the group);
            a reward's own ``deadline_s`` goes before it.
        memory_mib: address space that a worker may take on top of what it starts with.
        timeout_score: accuracy (for rewards without one: reward) of a response whose verification had to be stopped.
    """

    workers: int | None = None
    deadline_s: float = 5.0
    memory_mib: int = 1024
    timeout_score: float = 0.0

    def __post_init__(self) -> None:
        if self.workers is not None:
            check_at_least("data.reward_pool.workers", self.workers, 1)
        check_at_least("data.reward_pool.deadline_s", self.deadline_s, 0.01)
        check_at_least("data.reward_pool.memory_mib", self.memory_mib, 16)
        if not 0 <= self.timeout_score <= 1:
            raise ConfigError(
                "data.reward_pool.timeout_score", self.timeout_score, "write an accuracy: 0 (wrong) up to 1 (right)"
            )

    @property
    def size(self) -> int:
        if self.workers is not None:
            return self.workers
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        return min(16, cores)

    def shared_by(self, ranks: int) -> PoolOptions:
        """The options of one of several pools on this machine, which share its cores if ``workers`` is None."""
        return self if self.workers is not None or ranks == 1 else replace(self, workers=max(1, self.size // ranks))


class RewardPool:
    """Judges responses in worker processes; a :data:`~ibro_lightning.rewards.base.Judge`.

    The processes are started in the background; the first call waits for them. Use it as a context manager, or call
    :meth:`close`; if neither happens, they end with this process.

    Args:
        rewards: those that may be judged. What they are made of is judged on its own; those with ``pooled = False``
            stay in this process.
        options: processes, deadline, memory.

    Raises:
        ConfigError: a reward cannot be sent to another process.
    """

    def __init__(self, rewards: Iterable[Reward], options: PoolOptions = PoolOptions()) -> None:
        self.options, self.rewards = options, list(rewards)
        leaves = [leaf for reward in self.rewards for leaf in reward.leaves() if leaf.pooled]
        self._rewards = list({id(leaf): leaf for leaf in leaves}.values())
        self._which = {id(reward): index for index, reward in enumerate(self._rewards)}
        self._pickled = _pickle(self._rewards)
        self._workers: list[Worker] = []
        self._counts: dict[Stopped, int] = {"timeout": 0, "memory": 0, "crash": 0}
        self.longest_s = 0.0
        """Longest that a response (or a group) took so far, until it was judged or its worker was gone."""
        self._mean_s = 0.0
        self._restarts = 0
        self._server: Server | None = None
        self._finalizer: Any = None
        if self._rewards:
            self._start()

    @property
    def counts(self) -> Mapping[Stopped, int]:
        """How many verifications were stopped so far, by reason."""
        return self._counts

    @property
    def worker_pids(self) -> tuple[int, ...]:
        return tuple(worker.pid for worker in self._workers)

    def __enter__(self) -> RewardPool:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """End all processes. The pool starts anew if it is used again."""
        for worker in self._workers:
            worker.conn.close()
        self._workers.clear()
        if self._server is not None:
            self._finalizer()
            self._server = None

    def __call__(self, reward: Reward, answered: Sequence[Answered]) -> list[list[RewardResult]]:
        """One list of results per prompt, one result per response, in order.

        Raises:
            RewardError: the reward raised, or returned something that is no result.
        """
        which = self._which.get(id(reward))
        if which is None:
            return judge_here(reward, answered)
        waiting = deque(self._slices(which, reward, answered))
        results: list[list[RewardResult | None]] = [[None] * len(completions) for _, completions in answered]
        self._restarts = 0
        try:
            self._run(waiting, results)
        except BaseException:  # Ctrl-C, too: whoever is still at work must not answer the next call
            self.close()
            raise
        return [[result for result in row if result is not None] for row in results]

    def _slices(self, which: int, reward: Reward, answered: Sequence[Answered]) -> Iterator[Slice]:
        deadline = self.options.deadline_s if reward.deadline_s is None else reward.deadline_s
        share = sum(len(completions) for _, completions in answered) // (4 * self.options.size)
        for place, (prompt, completions) in enumerate(answered):
            step = max(1, min(SLICE, share) if reward.one_by_one else len(completions))
            for offset in range(0, len(completions), step):
                yield Slice(which, place, offset, prompt, completions[offset : offset + step], deadline)

    def _run(self, waiting: deque[Slice], results: list[list[RewardResult | None]]) -> None:
        while waiting or any(worker.slices for worker in self._workers):
            try:
                self._feed(waiting)
                self._listen(waiting, results)
            except ServerDied as error:
                self._restarts += 1
                if self._restarts > MAX_RESTARTS:
                    raise RewardError("data.reward_pool: its process died again and again; is memory short?") from error
                for worker in self._workers:
                    waiting.extendleft(reversed(worker.slices))
                self.close()
                self._start()

    def _start(self) -> None:
        self._server = Server(self._pickled, self.options.memory_mib)
        self._finalizer = weakref.finalize(self, self._server.close)

    def _feed(self, waiting: deque[Slice]) -> None:
        """Give every idle worker something to do, and those about to be idle their next message."""
        if self._server is None:
            self._start()
        assert self._server is not None
        self._server.wait_until_ready()
        while len(self._workers) < min(self.options.size, len(self._workers) + len(waiting)):
            self._workers.append(self._server.fork())
        for worker in sorted(self._workers, key=lambda worker: len(worker.slices)):
            # The last few slices wait here for whoever is free first, not behind a response that may be hanging.
            if waiting and len(worker.slices) < (2 if len(waiting) > 4 * len(self._workers) else 1):
                message = waiting[0].message()
                if worker.slices and len(message) > SMALL:
                    continue
                if not worker.slices:
                    worker.started = time.monotonic()
                worker.slices.append(waiting.popleft())
                with contextlib.suppress(OSError):  # it is dead, which _listen finds out
                    worker.conn.send_bytes(message)

    def _listen(self, waiting: deque[Slice], results: list[list[RewardResult | None]]) -> None:
        """Take what workers have to say, and stop those whose time is over."""
        busy = [worker for worker in self._workers if worker.slices]
        patience = min(worker.expires for worker in busy) - time.monotonic()
        with selectors.DefaultSelector() as selector:
            for worker in busy:
                selector.register(worker.conn, selectors.EVENT_READ, worker)
            heard = [key.data for key, _ in selector.select(max(0.0, patience))]
        if all(len(worker.slices) > 1 for worker in busy):  # nobody runs dry meanwhile
            time.sleep(min(NAP_S, SLICE / 2 * self._mean_s, busy[0].slices[0].deadline_s / 20))
        for worker in heard:
            while worker.slices and worker.has_news:
                if not self._receive(worker, waiting, results):
                    break
        for worker in busy:
            if worker.slices and time.monotonic() >= worker.expires and not worker.has_news:
                self._stop(worker, "timeout", waiting, results)

    def _receive(self, worker: Worker, waiting: deque[Slice], results: list[list[RewardResult | None]]) -> bool:
        """Take one message; False if the worker is no more."""
        try:
            said = pickle.loads(worker.conn.recv_bytes())
        except (EOFError, OSError):
            self._stop(worker, "crash", waiting, results)
            return False
        if said == MEMORY:
            self._stop(worker, "memory", waiting, results)
            return False
        if isinstance(said, BaseException):
            raise said
        now = time.monotonic()
        self.longest_s = max(self.longest_s, now - worker.started)
        self._mean_s += 0.05 * (now - worker.started - self._mean_s)
        current, worker.started = worker.slices.popleft(), now
        results[current.place][current.offset : current.offset + len(said)] = said
        worker.slices.extendleft(current.rest(len(said)))
        return True

    def _stop(
        self, worker: Worker, why: Stopped, waiting: deque[Slice], results: list[list[RewardResult | None]]
    ) -> None:
        """End a worker. What it was judging gets the configured score, or after a first crash another try (it may
        have been killed from outside); what it had not begun goes back to the queue."""
        assert self._server is not None
        current, *later = worker.slices
        self._server.kill(worker)
        self._workers.remove(worker)
        self.longest_s = max(self.longest_s, time.monotonic() - worker.started)
        reward = self._rewards[current.which]
        judged_together = 1 if reward.one_by_one else len(current.completions)
        if why == "crash" and not current.crashed:
            again = [*current.rest(0, crashed=True)]
        else:
            self._counts[why] += judged_together
            stopped = [reward.stopped(self.options.timeout_score)] * judged_together
            results[current.place][current.offset : current.offset + judged_together] = stopped
            again = [*current.rest(judged_together)]
        if reward.one_by_one:  # where one response was hard to judge, others may be: everybody shall have some of them
            again = [single for left in again for single in left.singles()]
        waiting.extendleft(reversed([*again, *later]))


def _pickle(rewards: list[Reward]) -> bytes:
    """By value where a class cannot be imported elsewhere: those of notebooks and scripts."""
    try:
        return cloudpickle.dumps(rewards)
    except Exception as error:
        raise ConfigError(
            "data.reward_pool",
            ", ".join(type(reward).__name__ for reward in rewards),
            f"cannot be sent to worker processes ({type(error).__name__}: {error}): set pooled = False in the class of "
            "the reward that holds this, or write data.reward_pool: null",
        ) from error
