"""Weights of the policy loss by the sign of the advantage: learning from right responses sharpens the policy, learning
from wrong ones spreads it, so their balance moves entropy."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ibro_lightning.batches.experience import TokenStats
from ibro_lightning.regularizers.base import PolicyLossMethod
from ibro_lightning.regularizers.coefficients import (
    Coefficient,
    EntropyBand,
    EntropySteps,
    TrackedNumber,
    as_coefficient,
)
from ibro_lightning.regularizers.method import Method


class PositiveAdvantageWeight(PolicyLossMethod):
    """The policy loss of tokens with ``A > 0``, times λ: positive-advantage reweighting (arXiv 2511.05993).

    The paper moves λ in stages (:class:`.Stages`), with the epochs (:class:`.Linear`) or by the entropy
    (:class:`.EntropySteps`). A note by others was seen, not the paper: the values of stages and targets are yours.

    Args:
        weight: λ, a number or a coefficient; None: ``EntropySteps()``.
    """

    method = Method(
        formula="the policy loss of tokens with A > 0, times λ, which moves in stages, with the epochs or by entropy",
        source="arXiv 2511.05993",
        certainty="note",
        recipe="regularizer: {class_path: PositiveAdvantageWeight, init_args: {}}",
    )
    zero_without_advantage = True
    reads_old_entropy = False

    def __init__(self, weight: Coefficient | float | None = None) -> None:
        super().__init__()
        self.weight = as_coefficient(EntropySteps() if weight is None else weight, "weight", "entropy")

    @property
    def coefficients(self) -> Mapping[str, TrackedNumber]:
        return {**super().coefficients, "weight": self.weight}

    def shape_policy_loss(self, loss: Tensor, stats: TokenStats) -> Tensor:
        return torch.where(stats.advantages > 0, self.weight.value * loss, loss)


class EntroPIC(PolicyLossMethod):
    """The policy loss times one weight where ``A > 0`` and another where ``A < 0``, which a proportional-integral
    controller each moves so as to keep entropy at a target (arXiv 2511.15248).

    Only the abstract was seen: that the controllers start at 1 and move against each other, their gains, limits and
    target are ours.

    Args:
        positive: the weight where the advantage is positive; None: ``EntropyBand(low=0.3, high=0.3, proportional=1.0,
            integral=0.1, start=1.0, maximum=2.0, raises_entropy=False)``.
        negative: the weight where it is negative; None: the same, with ``raises_entropy=True``.
    """

    method = Method(
        formula="the policy loss times a weight for A > 0 and one for A < 0; PI controllers hold H at 0.3 by them",
        source="arXiv 2511.15248",
        certainty="abstract only",
        recipe="regularizer: {class_path: EntroPIC, init_args: {}}",
    )
    zero_without_advantage = True
    reads_old_entropy = False

    def __init__(
        self, positive: Coefficient | float | None = None, negative: Coefficient | float | None = None
    ) -> None:
        super().__init__()
        weights = {"positive": (positive, False), "negative": (negative, True)}
        self.weights = {
            name: as_coefficient(_controller(raises_entropy) if weight is None else weight, name, "entropy")
            for name, (weight, raises_entropy) in weights.items()
        }

    @property
    def coefficients(self) -> Mapping[str, TrackedNumber]:
        return {**super().coefficients, **self.weights}

    def shape_policy_loss(self, loss: Tensor, stats: TokenStats) -> Tensor:
        positive, negative = self.weights["positive"].value, self.weights["negative"].value
        return torch.where(stats.advantages > 0, positive * loss, negative * loss)


def _controller(raises_entropy: bool) -> EntropyBand:
    return EntropyBand(
        low=0.3, high=0.3, proportional=1.0, integral=0.1, start=1.0, maximum=2.0, raises_entropy=raises_entropy
    )
