"""The seam for entropy regularisers."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor

from ibro_lightning.errors import check_at_least
from ibro_lightning.types import TokenStats


class EntropyRegularizer(ABC):
    """Adds ``−coef · agg(objective)`` to the policy loss; ``agg`` is the loss's own token mean over the whole step.

    A new regulariser is one class with one method, in any importable file::

        class HighEntropyBonus(EntropyRegularizer):
            def objective(self, stats):
                return stats.entropy * (stats.old_entropy > 0.5)

    Args:
        coef: α ≥ 0. At 0 the term is not computed at all.
    """

    needs_entropy: bool = True
    """Whether :meth:`objective` reads ``stats.entropy``; if not, entropies are not computed with a gradient."""

    def __init__(self, coef: float) -> None:
        check_at_least("regularizer.init_args.coef", coef, 0, "; the sign belongs to the regulariser's objective")
        self.coef = coef

    @abstractmethod
    def objective(self, stats: TokenStats) -> Tensor:
        """The per-token quantity to **maximise**, ``[B, T]`` in nats. Values under a False mask are ignored."""
