"""The interface between an update and the loop around it: a LightningModule's trainer, Fabric, or a plain loop."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn
from torch.optim import Optimizer

from ibro_lightning.ranks import ALONE, Ranks


class Loop(Protocol):
    """Read on every use: optimizers and ranks may exist only after the update's objects."""

    @property
    def networks(self) -> Mapping[str, nn.Module]:
        """The networks that learn, by name: ``policy``, perhaps ``critic``."""

    @property
    def optimizers(self) -> Sequence[Optimizer]:
        """The optimizers of all networks. Each steps with every network whose parameters it holds."""

    @property
    def schedules(self) -> Sequence[Any]:
        """Learning-rate schedules, which step with their ``optimizer``."""

    @property
    def ranks(self) -> Ranks:
        """This process's place among those that share the data."""

    def backward(self, loss: Tensor, /) -> Any:
        """Add ``loss``'s gradients to the parameters'; with several ranks, their mean over ranks."""

    def no_sync(self) -> AbstractContextManager[Any]:
        """The context of all backward passes of a step but the last: ranks need not exchange gradients yet."""

    def step(self, optimizer: Optimizer, *, counts: bool) -> Any:
        """Take ``optimizer``'s step; ``counts`` is True once per step of the policy."""


@dataclass
class PlainLoop:
    """A :class:`Loop` of plain values, by default of one process with plain torch."""

    networks: Mapping[str, nn.Module]
    optimizers: Sequence[Optimizer]
    schedules: Sequence[Any] = ()
    backward: Callable[[Tensor], Any] = Tensor.backward
    no_sync: Callable[[], AbstractContextManager[Any]] = nullcontext
    ranks: Ranks = ALONE

    def step(self, optimizer: Optimizer, *, counts: bool) -> None:
        optimizer.step()
