"""Lightning's side of :class:`~ibro_lightning.update.loop.Loop`: a module's optimizers, ranks and backward passes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.strategies import ParallelStrategy
from torch import Tensor, nn
from torch.optim import Optimizer

from ibro_lightning.ranks import ALONE, Ranks


class TrainerLoop:
    """The loop of a module's trainer; without a trainer, the module is alone.

    Args:
        module: uses manual optimization.
        names: of the networks that learn; each is an attribute of the module.
    """

    def __init__(self, module: pl.LightningModule, names: Sequence[str]) -> None:
        self._module, self._names = module, names

    @property
    def networks(self) -> Mapping[str, nn.Module]:
        return {name: getattr(self._module, name) for name in self._names if hasattr(self._module, name)}

    @property
    def optimizers(self) -> Sequence[Optimizer]:
        return self._module.trainer.optimizers

    @property
    def schedules(self) -> Sequence[Any]:
        return [config.scheduler for config in self._module.trainer.strategy.lr_scheduler_configs]

    @property
    def ranks(self) -> Ranks:
        return ALONE if self._module._trainer is None else Ranks.of(self._module.trainer.strategy)

    def backward(self, loss: Tensor, /) -> None:
        self._module.manual_backward(loss)

    def no_sync(self) -> AbstractContextManager[Any]:
        """DDP exchanges gradients in the backward pass: only in that of a step's last micro-batch, for all of them."""
        strategy = self._module.trainer.strategy
        return strategy.block_backward_sync() if isinstance(strategy, ParallelStrategy) else nullcontext()

    def step(self, optimizer: Optimizer, *, counts: bool) -> None:
        """Through Lightning's wrapper once for every step of the policy: ``global_step`` counts these."""
        wrapped: Any = self._module.optimizers()
        candidates = wrapped if isinstance(wrapped, list) else [wrapped]
        (next(c for c in candidates if c.optimizer is optimizer) if counts else optimizer).step()
