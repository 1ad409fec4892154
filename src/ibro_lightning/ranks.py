"""Communication between the processes of a run. In a single process, every function is the identity.

A *rank* here is a share of the data. The processes of a tensor-parallel group hold parts of one model, see the same
data and count as one rank.

Objects travel through a separate gloo group: it works alongside any accelerator's group and waits for hours if need be,
as ranks generate for different times; :mod:`.guards.failure_watch` detects a dead rank. Tensors travel through the
strategy's own group.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any, TypeVar

import torch
from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_only, rank_zero_warn
from torch import Tensor, distributed

from ibro_lightning.errors import RankError
from ibro_lightning.guards import interruption
from ibro_lightning.guards.interruption import Interrupted

__all__ = ["ALONE", "Ranks", "rank_zero_info", "rank_zero_warn"]

T = TypeVar("T")

if getattr(rank_zero_only, "rank", None) is None:  # Lightning, which sets it on import, is not imported
    _launched = ("RANK", "LOCAL_RANK", "SLURM_PROCID", "JSM_NAMESPACE_RANK")
    rank_zero_only.rank = next((int(os.environ[name]) for name in _launched if name in os.environ), 0)  # type: ignore[attr-defined]

PATIENCE = timedelta(hours=6)
"""How long a rank waits for the others to finish their share of the responses. A dead rank is detected at once."""


@dataclass(frozen=True)
class Ranks:
    """This process among the others: ``rank`` of ``size`` shares of the data."""

    rank: int = 0
    size: int = 1
    data: Any = None
    """Process group over the data: one process of each tensor-parallel group. None: all processes."""
    control: Any = None
    """Gloo group of the same processes."""
    everyone: Any = None
    """Gloo group of all processes."""
    is_first: bool = True
    """Whether this process writes the run's files and prints."""
    leads: bool = True
    """Whether this process represents its share of the data, which its tensor-parallel neighbours hold as well."""

    @classmethod
    def of(cls, strategy: Any) -> Ranks:
        """The ranks of a Lightning strategy; :data:`ALONE` without a strategy or with one process. The first call opens
        the process groups, so all processes must make it at the same point."""
        if strategy is None or getattr(strategy, "world_size", 1) == 1 or not distributed.is_initialized():
            return ALONE
        ranks = getattr(strategy, "_ibro_ranks", None)
        if ranks is None:
            ranks = strategy._ibro_ranks = cls._open(strategy)
        return ranks

    @classmethod
    def _open(cls, strategy: Any) -> Ranks:
        world, rank = distributed.get_world_size(), distributed.get_rank()
        everyone = distributed.new_group(backend="gloo", timeout=PATIENCE)
        mesh = getattr(strategy, "_device_mesh", None)
        width = 1 if mesh is None else mesh["tensor_parallel"].size()
        if mesh is None or width == 1:
            return cls(rank, world, None, everyone, everyone, rank == 0)
        control, leads = None, rank % width == 0
        for offset in range(width):  # every process opens every group
            group = distributed.new_group(list(range(offset, world, width)), backend="gloo", timeout=PATIENCE)
            control = group if rank % width == offset else control
        return cls(
            rank // width, world // width, mesh["data_parallel"].get_group(), control, everyone, rank == 0, leads
        )

    def for_another_thread(self) -> Ranks:
        """The same ranks with groups of their own for objects: collectives of two threads must not mix. Collective.
        Tensors would still travel through the strategy's group, so the thread must send none."""
        if self.everyone is None:
            return self
        everyone = distributed.new_group(backend="gloo", timeout=PATIENCE)
        if self.control is self.everyone:
            return replace(self, control=everyone, everyone=everyone)
        own, control = distributed.get_process_group_ranks(self.control), None
        for members in sorted({tuple(m) for m in _gather(own, distributed.get_world_size(), self.everyone)}):
            group = distributed.new_group(list(members), backend="gloo", timeout=PATIENCE)
            control = group if list(members) == own else control
        return replace(self, control=control, everyone=everyone)

    def __len__(self) -> int:
        return self.size

    def share(self, items: Sequence[T]) -> list[T]:
        """Every ``size``-th item, beginning with this rank's."""
        return list(items[self.rank :: self.size])

    # Tensors, on the device of the strategy's group.

    def sum(self, value: Tensor) -> Tensor:
        return self._reduce(value, distributed.ReduceOp.SUM)

    def max(self, value: Tensor) -> Tensor:
        return self._reduce(value, distributed.ReduceOp.MAX)

    def mean(self, values: Tensor, weights: Tensor) -> Tensor:
        """Mean over the tokens of all ranks by ``weights`` (a mask, or numbers ≥ 0); 0 if all weights are 0."""
        if weights.dtype == torch.bool:  # as below, with fewer copies
            total, norm = torch.where(weights, values, 0.0).sum(), weights.count_nonzero()
        else:
            total, norm = (torch.where(weights > 0, values, 0.0) * weights).sum(), weights.sum()
        total, norm = self.sum(total), self.sum(norm)
        return torch.where(norm > 0, total / norm, 0.0)

    def largest(self, values: Tensor, mask: Tensor) -> Tensor:
        """Maximum over the tokens of all ranks where ``mask`` is 1; −inf if there are none."""
        return self.max(torch.where(mask, values, -torch.inf).amax() if mask.numel() else values.new_tensor(-torch.inf))

    def _reduce(self, value: Tensor, operation: Any) -> Tensor:
        if self.size == 1:
            return value
        total = value.detach().clone()
        distributed.all_reduce(total, operation, group=self.data)
        return total

    def top(self, values: Tensor, count: int, order: Tensor | None = None) -> Tensor:
        """Indices of those of this rank's values ``[N]`` that are among the ``count`` largest of all ranks. Among equal
        values, those with the smallest ``order`` ``[N]`` come first, then this rank's own order counts."""
        order = torch.zeros_like(values) if order is None else order
        by_order = order.argsort(stable=True)
        best = by_order[values[by_order].argsort(descending=True, stable=True)][:count]
        if self.size == 1:
            return best
        keys = zip((-values[best]).tolist(), order[best].tolist(), strict=True)
        gathered = enumerate(self.gather(list(keys)))
        ranked = sorted((key, rank, place) for rank, theirs in gathered for place, key in enumerate(theirs))
        return best[[place for _, rank, place in ranked[:count] if rank == self.rank]]

    # Objects are pickled, so they must come from this run itself.

    def gather(self, item: T) -> list[T]:
        """Every rank's item, in rank order, on every rank."""
        return _gather(item, self.size, self.control)

    def any(self, flag: bool) -> bool:
        return any(self.gather(flag))

    def join(self, share: Sequence[T]) -> list[T]:
        """Inverse of :meth:`share`: all items in their original order, on every rank."""
        shares = self.gather(list(share))
        return [shares[i % self.size][i // self.size] for i in range(sum(map(len, shares)))]

    def broadcast(self, item: T) -> T:
        """The first process's item, on all processes."""
        if self.everyone is None:
            return item
        box = [item]
        distributed.broadcast_object_list(box, src=0, group=self.everyone)
        return box[0]

    def all_to_all(self, parcels: Sequence[T]) -> list[T]:
        """All-to-all: ``parcels[r]`` goes to rank r; returns what each rank sent to this one."""
        if self.size == 1:
            return list(parcels)
        members = distributed.get_process_group_ranks(self.control)
        received: list[T] = []
        for sender in range(self.size):
            box: list[Any] = [None]
            mine = list(parcels) if sender == self.rank else None
            distributed.scatter_object_list(box, mine, src=members[sender], group=self.control)
            received.append(box[0])
        return received

    @contextmanager
    def all_or_none(self) -> Iterator[None]:
        """Runs work that each rank does on its own, without collectives inside; it succeeds on all ranks or on none.

        Raises:
            RankError: another rank raised; includes its error. The rank that failed raises its own.
            Interrupted: this rank or another one was asked to stop.
        """
        failure: BaseException | None = None
        try:
            with interruption.abandonable():
                yield
        except BaseException as error:
            failure = error
        if isinstance(failure, KeyboardInterrupt | SystemExit):  # leave at once: the failure watch informs the others
            raise failure
        stopping = failure.exit_code if isinstance(failure, Interrupted) else None
        message = "" if failure is None else str(failure) if stopping else f"{type(failure).__name__}: {failure}"
        world = distributed.get_world_size() if self.everyone is not None else 1
        reports = _gather((message, stopping), world, self.everyone)
        if failure is not None and not stopping:
            raise failure
        if failed := [f"rank {rank} failed: {text}" for rank, (text, code) in enumerate(reports) if text and not code]:
            raise RankError("; ".join(failed)) from failure
        if stops := [(text, code) for text, code in reports if code]:
            raise failure or Interrupted(*stops[0])


ALONE = Ranks()


def _gather(item: T, size: int, group: Any) -> list[T]:
    if size == 1:
        return [item]
    items: list[Any] = [None] * size
    distributed.all_gather_object(items, item, group=group)
    return items
