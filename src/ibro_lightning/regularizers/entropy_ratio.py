"""Entropy-ratio clipping (arXiv 2512.05591): no gradient where a token's whole distribution has moved too far."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ibro_lightning.batches.experience import TokenStats
from ibro_lightning.regularizers.base import PolicyLossMethod
from ibro_lightning.regularizers.coefficients import BoundedSetting, Coefficient, TrackedNumber
from ibro_lightning.regularizers.method import Method

TINY = 1e-8
"""Nats, added to both entropies, as in the authors' code: certain tokens have ratio 1."""


class EntropyRatioClip(PolicyLossMethod):
    """A token whose entropy ratio ``H_θ/H_old`` is not between ``1 − low`` and ``1 + high`` loses its policy gradient;
    its loss keeps its value. The clip of the probability ratio sees the sampled token alone, this one the distribution.

    In a rollout's first optimizer step nothing has moved yet, and all ratios are 1. The curve
    ``regularizer/entropy_ratio_clipped`` is the share of these tokens.

    Args:
        low: β_l, a number or a coefficient; 0.05 in the authors' recipe.
        high: β_h; likewise.
    """

    method = Method(
        formula="no policy gradient for tokens with H/H_old outside (1 − low, 1 + high)",
        source="arXiv 2512.05591",
        certainty="code read",
        recipe="regularizer: {class_path: EntropyRatioClip, init_args: {low: 0.05, high: 0.05}}",
    )
    shaping_needs_entropy = True
    acts_in_first_step = False
    zero_without_advantage = True

    def __init__(self, low: Coefficient | float = 0.05, high: Coefficient | float = 0.05) -> None:
        super().__init__()
        self.low = BoundedSetting("low", low, limit=1.0, example="0.05")
        self.high = BoundedSetting("high", high, example="0.05")

    @property
    def coefficients(self) -> Mapping[str, TrackedNumber]:
        return {**super().coefficients, **self.low.coefficients, **self.high.coefficients}

    def shape_policy_loss(self, loss: Tensor, stats: TokenStats) -> Tensor:
        return torch.where(self.outside(stats), loss.detach(), loss)

    def measure(self, stats: TokenStats) -> Mapping[str, Tensor]:
        return {"entropy_ratio_clipped": self.outside(stats)}

    def outside(self, stats: TokenStats) -> Tensor:
        """``[B, T]`` bool: the tokens whose ratio is out of bounds."""
        assert stats.entropy is not None
        assert stats.old_entropy is not None
        ratio = (stats.entropy.detach() + TINY) / (stats.old_entropy + TINY)
        return (ratio <= 1 - self.low.value) | (ratio >= 1 + self.high.value)
