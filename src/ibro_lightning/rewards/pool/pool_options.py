"""The settings of the reward pool."""

from __future__ import annotations

from dataclasses import dataclass, replace

from ibro_lightning.errors import ConfigError, check_at_least, check_count, is_number
from ibro_lightning.guards.machine import cores


@dataclass(frozen=True)
class PoolOptions:
    """How rewards are judged in worker processes.

    Args:
        workers: processes; None takes one per core that this process may use, at most 16.
        deadline_s: seconds that one response may take (for rewards that compare the responses of a group: the group);
            a reward's own ``deadline_s`` takes precedence.
        memory_mib: address space that a worker may take in addition to that at its start.
        timeout_score: accuracy (for rewards without one: reward) of a response whose verification was stopped.
        lost_share: from this share of stopped verifications on, a rollout (or a batch of an evaluation) counts as lost:
            it says little about its responses, which is reported at once.
        max_lost_rollouts: stop after this many lost rollouts in a row (in an evaluation: batches of a set), and before
            training if both trials of a first verdict are stopped; null never stops.
    """

    workers: int | None = None
    deadline_s: float = 5.0
    memory_mib: int = 1024
    timeout_score: float = 0.0
    lost_share: float = 0.5
    max_lost_rollouts: int | None = 3

    def __post_init__(self) -> None:
        if self.workers is not None:
            check_count("workers", self.workers, 1)
        check_at_least("deadline_s", self.deadline_s, 0.01)
        check_count("memory_mib", self.memory_mib, 16)
        if not (is_number(self.timeout_score) and 0 <= self.timeout_score <= 1):
            raise ConfigError("timeout_score", self.timeout_score, "write an accuracy: 0 (wrong) up to 1 (right)")
        if not (is_number(self.lost_share) and 0 < self.lost_share <= 1):
            raise ConfigError("lost_share", self.lost_share, "write a share: above 0, up to 1 (all)")
        if (most := self.max_lost_rollouts) is not None:
            check_count("max_lost_rollouts", most, 1, ", or null for never")

    @property
    def size(self) -> int:
        if self.workers is not None:
            return self.workers
        return min(16, cores())

    def shared_by(self, ranks: int) -> PoolOptions:
        """The options of each of several pools on this machine, which share its cores if ``workers`` is None."""
        return self if self.workers is not None or ranks == 1 else replace(self, workers=max(1, self.size // ranks))
