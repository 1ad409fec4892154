"""Supervised fine-tuning on demonstrations: the warm start that reinforcement learning needs."""

from __future__ import annotations

import math

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable

from ibro_lightning.batches.sequences import Sequences
from ibro_lightning.errors import ConfigError, check_at_least
from ibro_lightning.functional import token_mean
from ibro_lightning.models import PolicyLike, PolicyOptions
from ibro_lightning.modules.policy_module import PolicyModule
from ibro_lightning.timing import PhaseTimer
from ibro_lightning.update.updater import Updater


class SFTModule(PolicyModule):
    """Maximises the likelihood of the response tokens; cosine learning rate over the whole run.

    The arguments that are not explained here are in :class:`.PolicyModule`.

    Args:
        learning_rate: at its peak, after the warm-up. The default is for a pretrained model; one from scratch needs
            about a hundred times as much.
        final_lr_factor: the learning rate ends at this share of its peak, unless there is an ``lr_scheduler``.
        lr_scheduler: called with the optimizer: a class of ``torch.optim.lr_scheduler``, stepped with every optimizer
            step after the warm-up. None: the cosine; ``ReduceLROnPlateau`` is refused.
    """

    batch_type = Sequences
    schedule_settings = ("final_lr_factor",)

    def __init__(
        self,
        policy: PolicyLike,
        *,
        optimizer: OptimizerCallable = torch.optim.AdamW,
        learning_rate: float = 1e-5,
        warmup_steps: int = 10,
        final_lr_factor: float = 0.0,
        lr_scheduler: LRSchedulerCallable | None = None,
        max_grad_norm: float | None = 1.0,
        max_nonfinite_steps: int = 5,
        policy_options: PolicyOptions = PolicyOptions(),
    ) -> None:
        super().__init__(
            policy,
            optimizer=optimizer,
            learning_rate=learning_rate,
            warmup_steps=warmup_steps,
            lr_scheduler=lr_scheduler,
            policy_options=policy_options,
        )
        check_at_least("final_lr_factor", final_lr_factor, 0)
        self.final_lr_factor = final_lr_factor
        self.updater = Updater(self.loop, max_grad_norm=max_grad_norm, max_nonfinite_steps=max_nonfinite_steps)

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
            logp, _ = self.policy(batch, temperature=1.0, with_entropy=False)  # [B, T]
            loss = -token_mean(logp, batch.response_mask, self.ranks.sum(batch.response_mask.sum()))
            self.manual_backward(loss * self.ranks.size)  # DDP and FSDP average gradients over ranks
            losses = {"sft/loss": self.ranks.sum(loss.detach()).item()}
            self.updater.nonfinite.start_iteration()
            metrics = self.updater.clip_and_step("policy", losses, batch)
        self.report_skipped_steps()
        return {**losses, **metrics, **timer.metrics()}
