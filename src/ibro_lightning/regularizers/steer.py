"""STEER: tokens whose update would change entropy most learn a little less (arXiv 2510.10150)."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from ibro_lightning.batches.experience import Experience, TokenStats
from ibro_lightning.regularizers.base import PolicyLossMethod, StepContext
from ibro_lightning.regularizers.coefficients import BoundedSetting, Coefficient, TrackedNumber
from ibro_lightning.regularizers.method import Method

LEAST_CHANGE = 0.02
"""Nats: the largest |Ω| of a step counts as this at least, so that steps which hardly change entropy are left alone."""


class STEER(PolicyLossMethod):
    """The policy loss of a token is multiplied by ``w_t = exp(−k·|Ω_t|)``, with ``Ω_t = A_t (1 − π_t)(log π_t + H_t)``,
    to first order the change of entropy that the token's update brings.

    ``k = −log w_min / max(max_t |Ω_t|, 0.02)``: the token that changes entropy most has the weight ``w_min``, and a
    token without an effect has 1. The maximum is over the optimizer step's tokens on all ranks. π and H are those
    before the update, so that a token's weight does not depend on micro-batches; the authors' code takes the current
    policy's, with Ω times the probability ratio, which is the same in a rollout's first step.

    Args:
        w_min: the smallest weight, a number or a coefficient; 0.8 in the paper, and 1 changes nothing.
    """

    method = Method(
        formula="the policy loss times exp(−k·|Ω|), Ω = A(1 − π)(log π + H), k = −log w_min / max(max |Ω|, 0.02)",
        source="arXiv 2510.10150",
        certainty="code read",
        recipe="regularizer: {class_path: STEER, init_args: {w_min: 0.8}}",
    )
    prepare_needs_scores = True
    zero_without_advantage = True

    def __init__(self, w_min: Coefficient | float = 0.8) -> None:
        super().__init__()
        self.w_min = BoundedSetting("w_min", w_min, limit=1.0, example="0.8; 1 changes nothing")

    @property
    def coefficients(self) -> Mapping[str, TrackedNumber]:
        return {**super().coefficients, **self.w_min.coefficients}

    def prepare(self, step: Experience, context: StepContext) -> Experience:
        assert step.old_logp is not None
        assert step.old_entropy is not None
        change = step.advantages * -step.old_logp.expm1() * (step.old_logp + step.old_entropy)  # [N] Ω
        change = torch.where(step.mask, change, 0.0).abs()
        largest = context.ranks.largest(change, step.mask).clamp(min=LEAST_CHANGE)
        return step.with_extra(steer_weight=(math.log(self.w_min.value) / largest * change).exp())

    def shape_policy_loss(self, loss: Tensor, stats: TokenStats) -> Tensor:
        return loss * stats.extra["steer_weight"]
