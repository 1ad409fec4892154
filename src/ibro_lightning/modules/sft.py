"""Supervised fine-tuning on demonstrations: the warm start that reinforcement learning needs."""

from __future__ import annotations

import math
from typing import Any

from ibro_lightning.errors import ConfigError
from ibro_lightning.functional import token_mean
from ibro_lightning.models import PolicySource
from ibro_lightning.modules.base import PolicyModule
from ibro_lightning.sequences import Sequences
from ibro_lightning.timing import PhaseTimer


class SFTModule(PolicyModule):
    """Maximises the likelihood of the response tokens; cosine learning rate over the whole run.

    Args:
        policy: see :class:`PolicyModule`.
        final_lr_factor: the learning rate ends at this share of its peak.
        policy_settings: optimizer, warmup_steps, max_grad_norm, policy_options, as in :class:`PolicyModule`.
    """

    def __init__(self, policy: str | PolicySource, final_lr_factor: float = 0.0, **policy_settings: Any) -> None:
        super().__init__(policy, **policy_settings)
        self.final_lr_factor = final_lr_factor

    def learning_rate_factor(self, step: int) -> float:
        if math.isinf(steps := self.trainer.estimated_stepping_batches):
            raise ConfigError("trainer.max_epochs", self.trainer.max_epochs, "the cosine needs an end: write 1 or more")
        total = max(1, int(steps) - self.warmup_steps)
        progress = min(1.0, max(0.0, (step - self.warmup_steps) / total))
        cosine = 0.5 * (1.0 + math.cos(math.pi * progress))
        return super().learning_rate_factor(step) * (self.final_lr_factor + (1.0 - self.final_lr_factor) * cosine)

    def training_step(self, batch: Sequences, batch_idx: int) -> dict[str, float]:
        timer = PhaseTimer()
        with timer("update"):
            logp, _ = self.policy(batch, temperature=1.0, with_entropy=False)
            loss = -token_mean(logp, batch.response_mask, self.ranks.sum(batch.response_mask.sum()))
            self.manual_backward(loss * self.ranks.size)  # DDP and FSDP average gradients over ranks
            losses = {"sft/loss": self.ranks.sum(loss.detach()).item()}
            self.nonfinite.begin()
            metrics = self.optimizer_step_clipped(losses, batch)
        self.report_skipped_steps()
        return {**losses, **metrics, **timer.metrics()}
