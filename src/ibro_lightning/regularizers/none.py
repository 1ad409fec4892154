"""No regularisation: the published DAPO."""

from __future__ import annotations

import torch
from torch import Tensor

from ibro_lightning.regularizers.base import EntropyRegularizer
from ibro_lightning.types import TokenStats


class NoRegularizer(EntropyRegularizer):
    """The loss is the policy gradient alone. Entropy is still measured, for the curves."""

    needs_entropy = False

    def __init__(self) -> None:
        super().__init__(coef=0.0)

    def objective(self, stats: TokenStats) -> Tensor:
        return torch.zeros_like(stats.logp)
