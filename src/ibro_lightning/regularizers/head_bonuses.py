"""Bonuses on another measure of uncertainty than Shannon's entropy of the whole distribution."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from ibro_lightning.batches.experience import TokenStats
from ibro_lightning.errors import ConfigError, is_number
from ibro_lightning.functional import Collision, HeadFunctional, RestrictedEntropy
from ibro_lightning.regularizers.base import EntropyRegularizer, StepContext
from ibro_lightning.regularizers.coefficients import Coefficient, EntropyBand
from ibro_lightning.regularizers.method import Method


class AEnt(EntropyRegularizer):
    """``J = agg(H̃_t)``, the entropy of the distribution renormalised over the likeliest tokens: a bonus that cannot be
    earned by spreading probability over the tail of the vocabulary (arXiv 2509.03493).

    The paper's coefficient keeps entropy between two bounds; its rule was not seen, so :class:`.EntropyBand` with the
    constants here is ours.

    Args:
        coef: α; None: ``EntropyBand(start=0.005, low=0.1, high=0.3)``.
        dropped: the share of the vocabulary that is left out, the least likely tokens; 0.3 in the paper.
    """

    method = Method(
        formula="−α·agg(H̃), H̃ of the likeliest 70 % of the vocabulary, renormalised; α keeps entropy in a band",
        source="arXiv 2509.03493; the rule of α is ours",
        certainty="note",
        recipe="regularizer: {class_path: AEnt, init_args: {dropped: 0.3}}",
    )
    needs_entropy = False
    reads_old_entropy = False

    def __init__(self, coef: Coefficient | float | None = None, dropped: float = 0.3) -> None:
        super().__init__(EntropyBand(low=0.1, high=0.3, start=0.005) if coef is None else coef)
        if not (is_number(dropped) and 0 <= dropped < 1):
            raise ConfigError(
                "dropped", dropped, "write a share of the vocabulary: a number from 0 up to, not including, 1"
            )
        self.dropped = dropped
        self.restricted = RestrictedEntropy(top_fraction=1 - dropped)

    def functionals(self, context: StepContext) -> Mapping[str, HeadFunctional]:
        return {"restricted_entropy": self.restricted}

    def objective(self, stats: TokenStats) -> Tensor:
        return stats.extra["restricted_entropy"]


class RenyiBonus(EntropyRegularizer):
    """``J = agg(−log Σp²)``, Rényi's entropy of order 2, which likely tokens decide: at equal entropy it is lower where
    one token stands out.

    Args:
        coef: α; the constant is ours.
    """

    method = Method(
        formula="+α·agg(log Σp²), Rényi's entropy of order 2",
        source="–",
        certainty="ours",
        recipe="regularizer: {class_path: RenyiBonus, init_args: {coef: 0.001}}",
    )
    needs_entropy = False
    reads_old_entropy = False

    def __init__(self, coef: Coefficient | float = 0.001) -> None:
        super().__init__(coef)

    def functionals(self, context: StepContext) -> Mapping[str, HeadFunctional]:
        return {"collision": Collision()}

    def objective(self, stats: TokenStats) -> Tensor:
        return -stats.extra["collision"].clamp(min=1e-30).log()
