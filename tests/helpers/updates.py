"""Modules on tiny models, trained on given rollouts, and losses of a step written out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from helpers.models import TinySource
from ibro_lightning.batches import Rollout
from ibro_lightning.batches.experience import Experience, MicroBatch, TokenStats
from ibro_lightning.engines.weight_check import WeightCheck
from ibro_lightning.modules import DAPOModule, PPOModule


def scored_first(module: Any) -> Any:
    """``module``, made to score a rollout before the update, as where anything needs the scores earlier; neither its
    scores nor its loss depend on that."""
    module.advantages_need_scores = True
    return module


def begin_step(module: Any, experience: Experience, seed: int = 0) -> Experience:
    """An optimizer step on all rows."""
    return module.policy_loss.prepare(experience, replace(module.context(), seed=seed))


def token_stats(module: Any, step: Experience | MicroBatch) -> TokenStats:
    """The policy's forward pass over a micro-batch, or a step in one."""
    micro = step.micro_batch() if isinstance(step, Experience) else step
    return module.policy_loss.stats(micro, module.context())


def micro_loss(module: Any, step: Experience | MicroBatch) -> tuple[Tensor, dict[str, float]]:
    """The policy's loss on a micro-batch, or a step in one, and its metrics."""
    micro = step.micro_batch() if isinstance(step, Experience) else step
    return module.policy_loss(token_stats(module, micro), micro)


def value_loss(module: Any, step: Experience | MicroBatch) -> tuple[Tensor, dict[str, float]]:
    """The critic's loss on a micro-batch, or a step in one, and its metrics."""
    micro = step.micro_batch() if isinstance(step, Experience) else step
    return module.value_loss(module.value_loss.stats(micro, module.context()), micro)


def assert_same(actual: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    """To 1e-9 of the largest entry: float64 leaves about 1e-15, and any wrong weight shows in the first digits."""
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9 * other.abs().max().item())


def ppo(dtype: torch.dtype = torch.float64, **settings: Any) -> PPOModule:
    module = PPOModule(TinySource(dtype), **settings)
    module.configure_model()
    return module


def summed(
    loss_of: Callable[[Experience], tuple[Tensor, Any]], parts: Sequence[Experience], parameters: Sequence[Tensor]
) -> list[Tensor]:
    """The losses' sum, then the sum of each parameter's gradients."""
    total = [torch.zeros((), dtype=torch.float64), *(torch.zeros_like(p) for p in parameters)]
    for part in parts:
        loss, _ = loss_of(part)
        for place, value in zip(total, [loss.detach(), *torch.autograd.grad(loss, parameters)], strict=True):
            place += value
    return total


CUTS = ([[0, 1, 2, 3, 4, 5, 6, 7]], [[7, 2], [0, 4, 1], [3, 5, 6]], [[row] for row in range(8)])


class Recorder(pl.Callback):
    """What each iteration returned, and the weights after it."""

    def __init__(self) -> None:
        self.metrics: list[Mapping[str, float]] = []
        self.weights: list[dict[str, Tensor]] = []

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._keep(pl_module)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.metrics.append(outputs)
        self._keep(pl_module)

    def _keep(self, module: pl.LightningModule) -> None:
        self.weights.append({name: value.clone() for name, value in module.state_dict().items()})

    def unchanged(self, before: int, after: int, prefix: str) -> bool:
        """Are a network's weights after ``before`` and ``after`` iterations the same to the bit?"""
        a, b = self.weights[before], self.weights[after]
        return all(torch.equal(a[name], b[name]) for name in a if name.startswith(prefix))


class Verified(pl.LightningDataModule):
    """Given rollouts, of an engine whose log-probs are checked after each sync."""

    def __init__(
        self, rollouts: Sequence[Rollout], check: WeightCheck | None = WeightCheck(), dtype: str = "float32"
    ) -> None:
        super().__init__()
        self.rollouts = list(rollouts)
        self.collector = SimpleNamespace(weight_check=check, engine=SimpleNamespace(dtype=dtype))

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.rollouts, batch_size=None)  # type: ignore[arg-type]


def fit(
    module: pl.LightningModule, rollouts: Sequence[Rollout] | pl.LightningDataModule, **settings: Any
) -> tuple[pl.Trainer, Recorder]:
    """Train on given rollouts, one Lightning batch each."""
    recorder = Recorder()
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    trainer = pl.Trainer(
        **{"accelerator": "cpu", "devices": 1, "max_epochs": 1, **quiet, **settings}, callbacks=[recorder]
    )
    given = isinstance(rollouts, pl.LightningDataModule)
    trainer.fit(module, rollouts if given else DataLoader(list(rollouts), batch_size=None))  # type: ignore[arg-type]
    return trainer, recorder


def adamw(lr: float) -> Any:
    return lambda parameters: torch.optim.AdamW(parameters, lr=lr)


def dapo(dtype: torch.dtype = torch.float64, **settings: Any) -> DAPOModule:
    module = DAPOModule(TinySource(dtype), **settings)
    module.configure_model()
    return module


def token_losses(name: str, logp: np.ndarray, old: np.ndarray, valid: np.ndarray, a: float) -> np.ndarray:
    """One response's policy loss, written out: bounds [0.8, 1.28], c = 10."""
    ratio = np.exp(logp - old)
    if name == "gmpo":  # the log-ratio's bounds are [-0.2, 0.28]
        log_ratio = np.minimum(logp - old, 0.28) if a > 0 else np.maximum(logp - old, -0.2)
        return np.full_like(ratio, -a * np.exp(log_ratio[valid].mean()))
    if name == "dppo":
        moved = np.exp(logp) - np.exp(old)
        return np.where(moved > 0.28 if a > 0 else moved < -0.2, 0.0, -ratio * a)
    if name == "sapo":
        temperature = 1.0 if a > 0 else 1.05
        return -4 * a / temperature / (1 + np.exp(-temperature * (ratio - 1)))
    if name == "gspo":
        ratio = np.full_like(ratio, np.exp((logp - old)[valid].mean()))
    clipped = ratio.clip(0.8, 1.28)
    if name == "cispo":
        return -clipped * a * logp
    loss = np.maximum(-ratio * a, -clipped * a)
    return np.minimum(loss, -10 * a) if a < 0 else loss


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1)
