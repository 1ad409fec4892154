"""The naive entropy bonus, a baseline of the paper."""

from __future__ import annotations

from torch import Tensor

from ibro_lightning.batches.experience import TokenStats
from ibro_lightning.regularizers.base import EntropyRegularizer
from ibro_lightning.regularizers.coefficients import Coefficient
from ibro_lightning.regularizers.method import Method


class EntropyBonus(EntropyRegularizer):
    """``J = agg(H_t)``: every token's entropy is raised alike (Williams & Peng, 1991; arXiv 1602.01783).

    Args:
        coef: α of ``L = L_PG − α·agg(H_t)``; 0.001 in arXiv 2507.18391.
    """

    method = Method(
        formula="−α·agg(H): every token alike; the naive bonus",
        source="arXiv 1602.01783",
        certainty="paper",
        recipe="regularizer: {class_path: EntropyBonus, init_args: {coef: 0.001}}",
    )
    reads_old_entropy = False

    def __init__(self, coef: Coefficient | float = 0.001) -> None:
        super().__init__(coef)

    def objective(self, stats: TokenStats) -> Tensor:
        assert stats.entropy is not None
        return stats.entropy
