"""What the processes of a run agree on. Alone, every function here is the identity.

A *rank* here is a share of the data. The processes of a tensor-parallel group hold parts of one model: they get the
same data, and count as one rank.

Objects travel through a gloo group of their own: it works beside any accelerator's, and waits for hours if need be, as
ranks generate for different times; that a rank is gone is for :mod:`.guards.failure_watch` to notice. Tensors go
through the strategy's own group.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed

from ibro_lightning.errors import RankError
from ibro_lightning.guards import interruption
from ibro_lightning.guards.interruption import Interrupted

T = TypeVar("T")

PATIENCE = timedelta(hours=6)
"""How long a rank waits for the others to finish their share of the responses. A rank that died is noticed at once."""


@dataclass(frozen=True)
class Ranks:
    """This process among the others: ``rank`` of ``size`` shares of the data."""

    rank: int = 0
    size: int = 1
    data: Any = None
    """Process group of those that share the data: one process of each tensor-parallel group. None: all."""
    control: Any = None
    """The gloo group of the same processes."""
    everyone: Any = None
    """The gloo group of all processes."""
    is_first: bool = True
    """Is this the process that writes the run's files and prints?"""
    leads: bool = True
    """Is this the process that speaks for its share of the data? Its tensor-parallel neighbours have the same."""

    @classmethod
    def of(cls, strategy: Any) -> Ranks:
        """The ranks of a Lightning strategy; the first call opens the groups, so all processes must make it together.
        Without a strategy, or with one process, alone."""
        if strategy is None or getattr(strategy, "world_size", 1) == 1 or not distributed.is_initialized():
            return ALONE
        known = getattr(strategy, "_ibro_ranks", None)
        if known is None:
            known = strategy._ibro_ranks = cls._open(strategy)
        return known

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
        """Mean over the tokens of all ranks; ``weights`` are a mask, or numbers ≥ 0. 0 if none counts."""
        total = self.sum((torch.where(weights > 0, values, 0.0) * weights).sum())
        norm = self.sum(weights.sum())
        return torch.where(norm > 0, total / norm, 0.0)

    def largest(self, values: Tensor, mask: Tensor) -> Tensor:
        """Over the tokens of all ranks where ``mask`` is 1; −inf if there are none."""
        return self.max(torch.where(mask, values, -torch.inf).amax() if mask.numel() else values.new_tensor(-torch.inf))

    def _reduce(self, value: Tensor, operation: Any) -> Tensor:
        if self.size == 1:
            return value
        total = value.detach().clone()
        distributed.all_reduce(total, operation, group=self.data)
        return total

    def top(self, values: Tensor, count: int) -> Tensor:
        """Which of this rank's values ``[N]`` are among the ``count`` largest of all ranks, as indices."""
        best = values.topk(min(count, len(values)))
        if self.size == 1:
            return best.indices
        everyones = enumerate(self.gather(best.values.tolist()))
        ordered = sorted((-value, rank, place) for rank, own in everyones for place, value in enumerate(own))
        mine = [place for _, rank, place in ordered[:count] if rank == self.rank]
        return best.indices[mine]

    # Objects, which must be of this run's making: they are pickled.

    def gather(self, item: T) -> list[T]:
        """Every rank's item, in the order of ranks, on every rank."""
        return _gather(item, self.size, self.control)

    def any(self, flag: bool) -> bool:
        return any(self.gather(flag))

    def join(self, share: Sequence[T]) -> list[T]:
        """Every rank's :meth:`share`, put together again: all items in their order, on every rank."""
        shares = self.gather(list(share))
        return [shares[i % self.size][i // self.size] for i in range(sum(map(len, shares)))]

    def broadcast(self, item: T) -> T:
        """The first process's item, on all processes."""
        if self.everyone is None:
            return item
        box = [item]
        distributed.broadcast_object_list(box, src=0, group=self.everyone)
        return box[0]

    def trade(self, parcels: Sequence[T]) -> list[T]:
        """``parcels[r]`` goes to rank r; what comes back is what each rank had for this one."""
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
    def together(self) -> Iterator[None]:
        """Work that each rank does on its own, without collectives inside: it ends well on all of them or on none.

        Raises:
            RankError: another rank raised; with its error. The rank that failed raises its own.
            Interrupted: this rank or another one was asked to stop.
        """
        failure: BaseException | None = None
        try:
            with interruption.abandonable():
                yield
        except BaseException as error:
            failure = error
        if isinstance(failure, KeyboardInterrupt | SystemExit):  # out, at once: the failure watch tells the others
            raise failure
        stopping = failure.exit_code if isinstance(failure, Interrupted) else None
        said = "" if failure is None else str(failure) if stopping else f"{type(failure).__name__}: {failure}"
        world = distributed.get_world_size() if self.everyone is not None else 1
        reports = _gather((said, stopping), world, self.everyone)
        if failure is not None and not stopping:
            raise failure
        if failed := [f"rank {rank} failed: {text}" for rank, (text, code) in enumerate(reports) if text and not code]:
            raise RankError("; ".join(failed)) from failure
        if wishes := [(text, code) for text, code in reports if code]:
            raise failure or Interrupted(*wishes[0])


ALONE = Ranks()


def _gather(item: T, size: int, group: Any) -> list[T]:
    if size == 1:
        return [item]
    items: list[Any] = [None] * size
    distributed.all_gather_object(items, item, group=group)
    return items
