"""The seam for entropy methods: what is added to the loss, and what is done to advantages or to the policy loss."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping

import torch
from torch import Tensor

from ibro_lightning.coefficients import Coefficient, as_coefficient
from ibro_lightning.experience import Experience, StepContext, TokenStats


class EntropyRegularizer(ABC):
    """Adds ``−coef · agg(objective)`` to the policy loss; ``agg`` is the loss's own aggregation over the whole step.

    A new regulariser is one class with one method, in any importable file::

        class HighEntropyBonus(EntropyRegularizer):
            def objective(self, stats):
                return stats.entropy * (stats.old_entropy > 0.5)

    Three further hooks do nothing unless overridden. In the order in which a step calls them: :meth:`prepare` (once per
    optimizer step), then for every micro-batch :meth:`statistics`, :meth:`objective`, :meth:`shape_policy_loss`.

    Args:
        coef: α ≥ 0, or a :class:`~ibro_lightning.coefficients.Coefficient` that moves it during training. While it is 0
            the term is not computed at all.
    """

    needs_entropy: bool = True
    """Whether :meth:`objective` reads ``stats.entropy``; if not, entropies are not computed with a gradient."""

    def __init__(self, coef: Coefficient | float) -> None:
        self.coefficient = as_coefficient(coef, "regularizer.init_args.coef", "entropy")

    @property
    def coef(self) -> float:
        """α as it is now."""
        return self.coefficient.value

    def prepare(self, step: Experience, context: StepContext) -> Experience:
        """Called once per optimizer step, without gradients, before it is cut into micro-batches: the place for
        statistics of the whole step, for another advantage, and for ``step.with_extra(name=[B, T])``. The mean of each
        tensor added is logged as ``regularizer/name``."""
        return step

    @property
    def prepare_needs_scores(self) -> bool:
        """Does :meth:`prepare` read ``old_logp`` or ``old_entropy``? Whoever overrides it is taken to, unless they say
        otherwise; if not, an update of one optimizer step saves a forward pass."""
        return type(self).prepare is not EntropyRegularizer.prepare

    def statistics(self, micro: Experience, context: StepContext) -> Mapping[str, Tensor]:
        """More of a micro-batch, *with* gradients, ``[B, T]`` each: they join ``stats.extra``. Only if α > 0."""
        return {}

    @abstractmethod
    def objective(self, stats: TokenStats) -> Tensor:
        """The per-token quantity to **maximise**, ``[B, T]`` in nats. Values under a False mask are ignored."""

    def shape_policy_loss(self, loss: Tensor, stats: TokenStats) -> Tensor:
        """Another policy loss in place of ``loss [B, T]``. Tokens set to 0 still count in the denominator."""
        return loss


class PolicyLossMethod(EntropyRegularizer):
    """A method that works through the advantages or the policy loss, and has no term of its own."""

    needs_entropy = False

    def __init__(self) -> None:
        super().__init__(coef=0.0)

    def objective(self, stats: TokenStats) -> Tensor:
        return torch.zeros_like(stats.logp)
