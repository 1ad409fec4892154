"""80/20: learn only from the most uncertain tokens (arXiv 2506.01939)."""

from __future__ import annotations

import torch
from torch import Tensor

from ibro_lightning.batches.experience import Experience, TokenStats
from ibro_lightning.regularizers.base import PolicyLossMethod, StepContext
from ibro_lightning.regularizers.covariance import check_fraction, top_tokens
from ibro_lightning.regularizers.method import Method


class TopEntropyTokens(PolicyLossMethod):
    """The policy loss of all but the most uncertain tokens is 0; the denominator still counts all of them.

    These are the tokens of the optimizer step, on all ranks, with the highest entropy under the policy that the rollout
    came from.

    Args:
        fraction: share of tokens to learn from; 0.2 in the paper.
    """

    method = Method(
        formula="the policy loss of the 20 % most uncertain tokens of the step alone (80/20)",
        source="arXiv 2506.01939",
        certainty="paper",
        recipe="regularizer: {class_path: TopEntropyTokens, init_args: {fraction: 0.2}}",
    )
    prepare_needs_scores = True
    zero_without_advantage = True

    def __init__(self, fraction: float = 0.2) -> None:
        super().__init__()
        check_fraction(fraction)
        self.fraction = fraction

    def prepare(self, step: Experience, context: StepContext) -> Experience:
        assert step.old_entropy is not None
        return step.with_extra(top_entropy=top_tokens(step.old_entropy, step, self.fraction, context))

    def shape_policy_loss(self, loss: Tensor, stats: TokenStats) -> Tensor:
        return torch.where(stats.extra["top_entropy"], loss, 0.0)
