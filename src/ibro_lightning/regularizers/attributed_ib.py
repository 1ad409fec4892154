"""IB whose effect can be attributed: to prompts of one difficulty, or to the choice within a prompt and a position.

``A·H`` mixes what a researcher wants to attribute: which prompts the term acts on, the uniform pressure on entropy that
comes with a mean advantage, and the choice between the tokens that one state allows.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Literal, get_args

import torch
from torch import Tensor

from ibro_lightning.batches.experience import Experience, TokenStats
from ibro_lightning.errors import ConfigError
from ibro_lightning.regularizers.base import EntropyRegularizer, StepContext
from ibro_lightning.regularizers.coefficients import Coefficient
from ibro_lightning.regularizers.method import Method

Prompts = Literal["hard", "easy", "mixed"]


class WeightedEntropy(EntropyRegularizer):
    """``J = agg(w_t·H_t)`` with weights of the whole optimizer step, whose mean is the curve ``regularizer/ib_weight``.

    Args:
        coef: α of ``L = L_PG − α·J``.
    """

    reads_old_entropy = False

    def __init__(self, coef: Coefficient | float = 0.005) -> None:
        super().__init__(coef)

    @abstractmethod
    def weight(self, step: Experience) -> Tensor:
        """``[N]`` the weight of each token's entropy; whole groups are on one rank."""

    def prepare(self, step: Experience, context: StepContext) -> Experience:
        return step.with_extra(ib_weight=self.weight(step)) if self.coef else step

    def objective(self, stats: TokenStats) -> Tensor:
        assert stats.entropy is not None
        return stats.extra["ib_weight"] * stats.entropy


class PassRateInformationBottleneck(WeightedEntropy):
    """IB with a coefficient of each prompt by its pass rate p: ``J = agg(c(p)·A_t·H_t)``.

    The group-normalised advantages of DAPO already weigh prompts: mean |A| is 2√(p(1 − p)) for rewards of two values.
    This says whether IB acts through the hard ones, the easy ones, or those between. p is the mean accuracy of the
    prompt's verified responses in the step. Without groups (``group_size: 1``) it is 0 or 1, so ``mixed`` needs them.

    Args:
        coef: α of ``L = L_PG − α·J``.
        prompts: c(p) is 1 − p for ``hard``, p for ``easy``, 4p(1 − p) for ``mixed``: 1 where it is largest.
    """

    method = Method(
        formula="−α·agg(c(p)·A·H), p the prompt's pass rate: c = 1 − p (`hard`), p (`easy`), 4p(1 − p) (`mixed`)",
        source="–",
        certainty="ours",
        recipe="regularizer: {class_path: PassRateInformationBottleneck, init_args: {coef: 0.005, prompts: hard}}",
    )
    zero_without_advantage = True

    def __init__(self, coef: Coefficient | float = 0.005, prompts: Prompts = "hard") -> None:
        super().__init__(coef)
        if prompts not in get_args(Prompts):
            raise ConfigError("prompts", prompts, "write hard, easy or mixed")
        self.prompts = prompts
        self.min_group_size = 2 if prompts == "mixed" else 1

    def weight(self, step: Experience) -> Tensor:
        accuracy = accuracy_of(step).double()  # [B]
        p = means(accuracy.nan_to_num(0.0), accuracy.isfinite().double(), step.groups).clamp(0.0, 1.0)
        scale = {"hard": 1 - p, "easy": p, "mixed": 4 * p * (1 - p)}[self.prompts]
        return step.per_token(scale).to(step.advantages.dtype) * step.advantages


class PositionCentredInformationBottleneck(WeightedEntropy):
    """IB by what remains of the advantage when its mean over the responses to the prompt that have a token at the same
    position is taken away: ``J = agg((A_it − Ā_{q,t})·H_it)``.

    No prompt and no position is then under a uniform pressure on its entropy, in particular not the late positions,
    which only long responses reach. What is left is between responses to one prompt at one position, a covariance
    within them. Each token counts as in the loss. A response that is alone at a position has the weight 0 there, so it
    needs groups (``group_size`` of 2 or more).

    Args:
        coef: α of ``L = L_PG − α·J``.
    """

    method = Method(
        formula="−α·agg((A − Ā of the prompt's responses at this position)·H)",
        source="–",
        certainty="ours",
        recipe="regularizer: {class_path: PositionCentredInformationBottleneck, init_args: {coef: 0.005}}",
    )
    min_group_size = 2

    def weight(self, step: Experience) -> Tensor:
        starts = step.lengths.cumsum(0) - step.lengths  # [B]
        places = torch.arange(len(step.mask), device=step.mask.device)  # [N]
        position = places - step.per_token(starts)
        width = int(step.lengths.max()) if len(step) else 1
        counts = step.mask.double() if step.weights is None else step.weights.double()
        advantages = torch.where(step.mask, step.advantages, 0.0).double()
        mean = means(advantages, counts, step.per_token(step.groups) * width + position)
        return torch.where(step.mask, advantages - mean, 0.0).to(step.advantages.dtype)


def accuracy_of(step: Experience) -> Tensor:
    """``[B]`` the accuracy of each response, nan where its verifier was stopped; its reward, where there is none."""
    accuracy = step.rewards if step.outcomes is None else step.outcomes
    assert accuracy is not None, "a step of a rollout has rewards"
    return accuracy


def means(values: Tensor, weights: Tensor, cells: Tensor) -> Tensor:
    """``[n]`` the mean of ``values`` over the entries of the same cell, by weights ≥ 0; 0 where all of them are 0."""
    _, cell = cells.unique(return_inverse=True)  # [n]
    size = int(cell.max()) + 1 if len(cell) else 0
    totals = (values.new_zeros(size).index_add_(0, cell, x) for x in (values * weights, weights))
    total, norm = totals
    return torch.where(norm > 0, total / norm, 0.0)[cell]
