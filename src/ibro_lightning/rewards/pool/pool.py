"""Worker processes for rewards: no response can hang, exhaust or crash the trainer.

If a response takes longer than its deadline, or more memory than its limit, its worker is killed and replaced, and the
response gets a configured score and is counted. Results come in the order of the responses.

What pebble's ``ProcessPool`` (5.2.3) does not do: fork workers from a process that has loaded the rewards (20 ms here;
there each new worker loads sympy again, 2 to 4 s), keep a deadline per response when a message holds several, retry
after a kill from outside, notice ``os._exit(0)`` before the deadline, end all workers when the trainer is killed. Not
covered: files, network and other processes that a reward uses; it has the user's rights (see ``rewards.code``).
"""

from __future__ import annotations

import contextlib
import math
import pickle
import selectors
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import cloudpickle

from ibro_lightning.errors import ConfigError, RewardError
from ibro_lightning.rewards.base import Request, Reward
from ibro_lightning.rewards.blame import blamed_on, described
from ibro_lightning.rewards.combine import judge_here
from ibro_lightning.rewards.gold_trial import GoldTrial, gives_plain_responses
from ibro_lightning.rewards.pool.lost import Loss, Stopped, Verdicts
from ibro_lightning.rewards.pool.pool_options import PoolOptions
from ibro_lightning.rewards.pool.processes import Server, ServerDied, Slice, Worker
from ibro_lightning.rewards.pool.server import MEMORY, READY
from ibro_lightning.types import RewardResult

SLICE = 8
"""Responses per message to a worker: enough to be worth a message, few enough to share the work evenly."""
MAX_QUEUED_BYTES = 64 * 2**10
"""Bytes that a socket takes without waiting for its reader: larger messages are not sent in advance."""
GATHER_S = 0.01
"""Longest time for which messages gather: waking for each of them would take a core from the workers."""
MAX_RESTARTS = 3
REPORT_AFTER_S = 30.0
"""Seconds of judging after which lost verdicts are reported before the judging is over."""


class RewardPool:
    """Judges responses in worker processes; a :data:`~ibro_lightning.rewards.base.Judge`.

    The processes start in the background; the first call waits for them. Use it as a context manager, or call
    :meth:`close`; otherwise they end with this process.

    Args:
        rewards: their leaves are sent to the workers, except for those with ``pooled = False``.
        options: processes, deadline, memory, and ``max_lost_rollouts``, which may be None.
    """

    def __init__(self, rewards: Iterable[Reward], options: PoolOptions = PoolOptions()) -> None:
        self.options, self.rewards = options, list(rewards)
        leaves = {id(leaf): leaf for reward in self.rewards for leaf in reward.leaves() if leaf.pooled}.values()
        self._rewards: list[Reward] = [*leaves, *(GoldTrial(leaf) for leaf in leaves if gives_plain_responses(leaf))]
        self._which = {_identity(reward): index for index, reward in enumerate(self._rewards)}
        self._pickled = _pickle(self._rewards)
        self._workers: list[Worker] = []
        self.counts: dict[Stopped, int] = {"timeout": 0, "memory": 0, "crash": 0}
        """The number of stopped verifications so far, by reason."""
        self._verdicts: dict[int, Verdicts] = {}
        self._called = 0.0
        self.say: Callable[[str], None] | None = None
        """Called with one line, at most once per call, if judging takes long and most verdicts are lost."""
        self.longest_s = 0.0
        """The longest time that a response (or a group) has taken until its verdict, or until its worker ended."""
        self._mean_s = 0.0
        self._waiting: deque[Slice] = deque()
        self._results: list[list[RewardResult | None]] = []
        self._server: Server | None = None
        self._finalizer: Any = None
        if self._rewards:
            self._start()

    def take_verdicts(self) -> list[Verdicts]:
        """The verdicts since the last call, by reward, without trials of golds."""
        taken, self._verdicts = list(self._verdicts.values()), {}
        return taken

    @property
    def worker_pids(self) -> tuple[int, ...]:
        return tuple(worker.pid for worker in self._workers)

    def __enter__(self) -> RewardPool:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """End all processes. Another call starts them again."""
        for worker in self._workers:
            worker.conn.close()
        self._workers.clear()
        if self._server is not None:
            self._finalizer()
            self._server = None

    def __call__(self, requests: Sequence[Request]) -> list[list[RewardResult]]:
        """One list of results per request, one result per response, in order. Workers judge all requests at once."""
        pooled = [(self._which.get(_identity(request.reward)), request) for request in requests]
        here = iter(judge_here([request for which, request in pooled if which is None]))
        self._results = [[None] * len(r.completions) if which is not None else [*next(here)] for which, r in pooled]
        for which, request in pooled:
            if which is not None and not isinstance(request.reward, GoldTrial):
                verdicts = self._verdicts.setdefault(which, Verdicts(type(request.reward).__name__))
                verdicts.asked += len(request.completions)
        self._called = time.monotonic()
        self._waiting = deque(self._slices(pooled))
        try:
            self._run()
        except BaseException:  # Ctrl-C, too: a worker still busy must not answer the next call
            self.close()
            raise
        results, self._results = self._results, []
        return [[result for result in row if result is not None] for row in results]

    def _slices(self, pooled: Sequence[tuple[int | None, Request]]) -> Iterator[Slice]:
        share = sum(len(request.completions) for which, request in pooled if which is not None)
        share //= 4 * self.options.size
        for place, (which, (reward, prompt, completions)) in enumerate(pooled):
            if which is None:
                continue
            deadline = self.options.deadline_s if reward.deadline_s is None else reward.deadline_s
            step = max(1, min(SLICE, share) if reward.one_by_one else len(completions))
            for offset in range(0, len(completions), step):
                yield Slice(which, place, offset, prompt, completions[offset : offset + step], deadline)

    def _run(self) -> None:
        restarts = 0
        while self._waiting or any(worker.slices for worker in self._workers):
            try:
                self._feed()
                self._listen()
            except ServerDied as error:
                restarts += 1
                if restarts > MAX_RESTARTS:
                    how = self._server.ended() if self._server else ""
                    what = f"reward_pool: the process that forks workers died {restarts} times{how and f' ({how})'}"
                    raise RewardError(f"{what}: is memory short, or does a reward's preload end it?") from error
                for worker in self._workers:
                    self._waiting.extendleft(reversed(worker.slices))
                self.close()
                self._start()

    def _start(self) -> None:
        self._server = Server(self._pickled, self.options.memory_mib)
        self._finalizer = weakref.finalize(self, self._server.close)

    def _feed(self) -> None:
        """Give work to every idle worker, and the next message to those about to be idle."""
        waiting = self._waiting
        if self._server is None:
            self._start()
        assert self._server is not None
        self._server.wait_until_ready()
        while len(self._workers) < min(self.options.size, len(self._workers) + len(waiting)):
            self._workers.append(self._server.fork())
        for worker in sorted(self._workers, key=lambda worker: len(worker.slices)):
            # The last few slices wait here for the first idle worker, not behind a response that may hang.
            if waiting and len(worker.slices) < (2 if len(waiting) > 4 * len(self._workers) else 1):
                message = waiting[0].message()
                if worker.slices and len(message) > MAX_QUEUED_BYTES:
                    continue
                if not worker.slices:
                    worker.started = time.monotonic()
                worker.slices.append(waiting.popleft())
                with contextlib.suppress(OSError):  # a dead worker is noticed in _listen
                    worker.conn.send_bytes(message)

    def _listen(self) -> None:
        """Receive the workers' messages, and stop workers past their deadline."""
        busy = [worker for worker in self._workers if worker.slices]
        patience = min(worker.expires for worker in busy) - time.monotonic()
        with selectors.DefaultSelector() as selector:
            for worker in busy:
                selector.register(worker.conn, selectors.EVENT_READ, worker)
            ready = [key.data for key, _ in selector.select(max(0.0, patience))]
        if all(len(worker.slices) > 1 for worker in busy):  # none runs out of work meanwhile
            time.sleep(min(GATHER_S, SLICE / 2 * self._mean_s, busy[0].slices[0].deadline_s / 20))
        for worker in ready:
            while worker.slices and worker.has_message:
                if not self._receive(worker):
                    break
        for worker in busy:
            if worker.slices and time.monotonic() >= worker.expires and not worker.has_message:
                self._stop(worker, "timeout")

    def _receive(self, worker: Worker) -> bool:
        """Receive one message; False if the worker is gone."""
        try:
            message = _unpacked(worker.conn.recv_bytes())
        except (EOFError, OSError):
            self._stop(worker, "crash")
            return False
        if message == READY:
            worker.ready, worker.started = True, time.monotonic()
            return True
        if message == MEMORY:
            self._stop(worker, "memory")
            return False
        if isinstance(message, BaseException):
            raise message
        now = time.monotonic()
        self.longest_s = max(self.longest_s, now - worker.started)
        self._mean_s += 0.05 * (now - worker.started - self._mean_s)
        current, worker.started = worker.slices.popleft(), now
        worker.judged += len(message)
        if current.which in self._verdicts:
            self._verdicts[current.which].judged += len(message)
        self._results[current.place][current.offset : current.offset + len(message)] = message
        worker.slices.extendleft(current.rest(len(message)))
        return True

    def _stop(self, worker: Worker, why: Stopped) -> None:
        """End a worker. What it was judging gets the configured score, or after a first crash another attempt (the
        worker may have been killed from outside); the rest goes back to the queue."""
        assert self._server is not None
        current, *later = worker.slices
        counts = why != "crash" or current.crashed
        code = self._server.ending(worker) if why == "crash" and counts else None
        self._server.kill(worker)
        self._workers.remove(worker)
        self.longest_s = max(self.longest_s, time.monotonic() - worker.started)
        reward = self._rewards[current.which]
        affected = 1 if reward.one_by_one else len(current.completions)
        if not counts:
            again = [*current.rest(0, crashed=True)]
        else:
            self.counts[why] += affected
            deadline_s = current.deadline_s if why == "timeout" else None
            self._lose(current.which, Loss(why, worker.ready, worker.judged == 0, code, deadline_s), affected)
            with blamed_on(reward, "stopped"):
                stopped = [reward.stopped(self.options.timeout_score)] * affected
            self._results[current.place][current.offset : current.offset + affected] = stopped
            again = [*current.rest(affected)]
        if reward.one_by_one:  # others may be hard to judge, too: the workers share them
            again = [single for left in again for single in left.singles()]
        self._waiting.extendleft(reversed([*again, *later]))

    def _lose(self, which: int, loss: Loss, count: int) -> None:
        if (verdicts := self._verdicts.get(which)) is None:  # the trial of a gold
            return
        verdicts.lost[loss] += count
        late = time.monotonic() - self._called > REPORT_AFTER_S
        if self.say is not None and late and verdicts.share_so_far >= self.options.lost_share:
            self._called = math.inf  # once per call
            self.say(f"{REPORT_AFTER_S:.0f} s of judging so far: {verdicts}")


def _identity(reward: Reward) -> tuple[bool, int]:
    """The identity of a reward in a pool. All trials of golds on one verifier are the same."""
    return (True, id(reward.verifier)) if isinstance(reward, GoldTrial) else (False, id(reward))


def _unpacked(message: bytes) -> Any:
    try:
        return pickle.loads(message)
    except Exception as error:
        raise RewardError(f"a reward's result cannot be read ({described(error)}): let it hold plain data") from error


def _pickle(rewards: list[Reward]) -> bytes:
    """Pickle by value where a class cannot be imported elsewhere, as in notebooks and scripts."""
    try:
        return cloudpickle.dumps(rewards)
    except (Exception, SystemExit) as error:
        names = ", ".join(type(reward).__name__ for reward in rewards)
        remedy = "set pooled = False in the class of the reward that holds this, or write reward_pool: null"
        reason = f"cannot be sent to worker processes ({type(error).__name__}: {error})"
        raise ConfigError("reward_pool", names, f"{reason}: {remedy}") from error
