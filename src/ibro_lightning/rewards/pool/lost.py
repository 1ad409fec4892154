"""Verdicts lost because their verification was stopped: how many, why, and what to do about it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from ibro_lightning.guards.signals import ended

Stopped = Literal["timeout", "memory", "crash"]


class Loss(NamedTuple):
    """How a verdict was lost."""

    why: Stopped
    ready: bool
    """Whether its worker had begun to work; otherwise it died at its start, before reading a response."""
    first: bool
    """Whether it would have been its worker's first."""
    code: int | None = None
    """The exit code of a crash, or minus the signal's number."""
    deadline_s: float | None = None

    @property
    def reason(self) -> str:
        if self.why == "timeout":
            return f"timed out after {self.deadline_s:g} s"
        if self.why == "memory":
            return "exceeded data.reward_pool.memory_mib"
        moment = "on the response" if self.ready else "at its start, before a response"
        return f"worker died {moment}: {ended(self.code)}"

    @property
    def remedy(self) -> str:
        if self.why == "timeout" and self.first:
            remedy = "all in fresh workers: import and load what is slow in the reward's method preload, run once, "
            return f"{remedy}before workers are forked; or raise data.reward_pool.deadline_s"
        if self.why == "timeout":
            return "raise data.reward_pool.deadline_s or the reward's own deadline_s, or fix what takes so long"
        if self.why == "memory":
            return "raise data.reward_pool.memory_mib, or load what is large in the reward's method preload"
        if not self.ready:
            return "raise data.reward_pool.memory_mib; is the machine short of memory or processes?"
        if self.code == -9:
            return "is the machine short of memory? Write fewer data.reward_pool.workers"
        if self.code is not None and self.code >= 0:
            return "look for what ends the process: os._exit in the reward, or in a library that it calls"
        return "look for a fault in native code that the reward calls, or raise data.reward_pool.memory_mib"


@dataclass
class Verdicts:
    """How many verdicts of one reward were given and lost."""

    reward: str
    asked: int = 0
    judged: int = 0
    lost: Counter[Loss] = field(default_factory=Counter)

    @property
    def share(self) -> float:
        """The share that was lost."""
        return self.lost.total() / self.asked if self.asked else 0.0

    @property
    def share_so_far(self) -> float:
        """The share among those already given or lost."""
        settled = self.judged + self.lost.total()
        return self.lost.total() / settled if settled else 0.0

    def __str__(self) -> str:
        """``24 of 32 verdicts of Mine were lost (20 timed out after 5 s; 4 ...) - remedy``, in one line."""
        reasons = Counter(loss.reason for loss in self.lost.elements())
        named = "; ".join(f"{count} {reason}" for reason, count in reasons.most_common())
        return f"{self.lost.total()} of {self.asked} verdicts of {self.reward} were lost ({named}) - {self._remedy()}"

    def _remedy(self) -> str:
        """What to do about the most frequent reason. Timeouts point to a slow import only if nearly all are firsts."""
        if not self.lost:
            return ""
        why = Counter(loss.why for loss in self.lost.elements()).most_common(1)[0][0]
        losses = Counter(loss for loss in self.lost.elements() if loss.why == why)
        firsts = sum(loss.first for loss in losses.elements())
        return losses.most_common(1)[0][0]._replace(first=firsts >= 0.9 * losses.total()).remedy


def joined(tables: Iterable[Iterable[Verdicts]]) -> list[Verdicts]:
    """The sums over several pools (those of all ranks, say), by reward."""
    sums: dict[str, Verdicts] = {}
    for verdicts in (verdicts for table in tables for verdicts in table):
        total = sums.setdefault(verdicts.reward, Verdicts(verdicts.reward))
        total.asked += verdicts.asked
        total.judged += verdicts.judged
        total.lost.update(verdicts.lost)
    return list(sums.values())
