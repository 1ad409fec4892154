"""Conditional Entropy Shaping: it lowers the entropy of uncertain tokens on right paths and raises it on wrong ones."""

from __future__ import annotations

import torch
from torch import Tensor

from ibro_lightning.batches.experience import Experience, TokenStats
from ibro_lightning.errors import ConfigError, is_number
from ibro_lightning.regularizers.attributed_ib import accuracy_of
from ibro_lightning.regularizers.base import EntropyRegularizer, StepContext
from ibro_lightning.regularizers.coefficients import Coefficient
from ibro_lightning.regularizers.covariance import check_fraction, top_tokens
from ibro_lightning.regularizers.method import Method


class ConditionalEntropyShaping(EntropyRegularizer):
    """``J = agg(s_i·1{t uncertain}·H_t)`` with ``s_i`` −1 on right responses and 1 on wrong ones (arXiv 2605.19358):
    concise where the path is right, exploring where it is wrong.

    The abstract alone was seen: it penalises high-entropy "forking" tokens on correct paths and rewards them on
    incorrect ones, on DAPO. That the term is the entropy itself, its coefficient, the share of tokens and the accuracy
    that counts as right are ours. Unlike :class:`.OppositeInformationBottleneck` it looks at correctness, not at the
    advantage, and leaves tokens of which the policy is sure alone.

    Args:
        coef: α of ``L = L_PG − α·J``.
        fraction: the share of the step's tokens, on all ranks, that is uncertain: those with the highest entropy under
            the policy that the rollout came from.
        right_from: the least accuracy of a right response, above 0 and up to 1. One that was not verified to
            the end is neither.
    """

    method = Method(
        formula="−α·agg(s·H) on the 20 % most uncertain tokens of the step; s = −1 on right responses, 1 on wrong ones",
        source="arXiv 2605.19358",
        certainty="abstract only",
        recipe="regularizer: {class_path: ConditionalEntropyShaping, init_args: {coef: 0.001, fraction: 0.2}}",
    )
    prepare_needs_scores = True

    def __init__(self, coef: Coefficient | float = 0.001, fraction: float = 0.2, right_from: float = 0.5) -> None:
        super().__init__(coef)
        check_fraction(fraction)
        if not (is_number(right_from) and 0 < right_from <= 1):
            remedy = "write the least accuracy of a right response, above 0 and up to 1, such as 0.5"
            raise ConfigError("right_from", right_from, remedy)
        self.fraction, self.right_from = fraction, right_from

    def prepare(self, step: Experience, context: StepContext) -> Experience:
        assert step.old_entropy is not None
        uncertain = top_tokens(step.old_entropy, step, self.fraction, context)  # [N]
        accuracy = accuracy_of(step)  # [B]
        wrong, right = accuracy < self.right_from, accuracy >= self.right_from  # neither, where it is nan
        sign = step.per_token(wrong.to(step.advantages.dtype) - right.to(step.advantages.dtype))  # [N]
        return step.with_extra(ces_sign=torch.where(uncertain, sign, 0.0))

    def objective(self, stats: TokenStats) -> Tensor:
        assert stats.entropy is not None
        return stats.extra["ces_sign"] * stats.entropy
