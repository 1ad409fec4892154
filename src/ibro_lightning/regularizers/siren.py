"""SIREN: the entropy of a few likely tokens at a response's most uncertain places stays where it began."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from ibro_lightning.batches.experience import Experience, TokenStats
from ibro_lightning.batches.ragged import row_wise
from ibro_lightning.errors import check_at_least
from ibro_lightning.functional import HeadFunctional, RestrictedEntropy
from ibro_lightning.regularizers.base import EntropyRegularizer, StepContext
from ibro_lightning.regularizers.coefficients import Coefficient, Constant, TrackedNumber
from ibro_lightning.regularizers.covariance import check_fraction
from ibro_lightning.regularizers.method import Method


class Anchor(TrackedNumber):
    """A number that is measured once, in the run's first optimizer step, and then stays: 0 until :meth:`settle`."""

    def __init__(self) -> None:
        super().__init__(value=0.0, settled=0.0)

    @property
    def value(self) -> float:
        return self.state["value"]

    @property
    def settled(self) -> bool:
        """Whether it has been measured."""
        return bool(self.state["settled"])

    def settle(self, measured: float) -> None:
        """Stay at ``measured`` from now on, if it is finite and the first."""
        if not self.settled and math.isfinite(measured):
            self.state |= {"value": measured, "settled": 1.0}


class SIREN(EntropyRegularizer):
    """``J = −(H̃ − H̃₁)²``, with H̃ the mean of the top-p entropy over each response's most uncertain positions, and H̃₁
    its value in the run's first optimizer step, even if α is still 0 there (arXiv 2509.25133).

    The top-p entropy is that of the distribution renormalised over the likeliest tokens which together have the
    probability p (:class:`.RestrictedEntropy`; the authors' code leaves out the token that reaches p); by it the
    positions are chosen, too. H̃ is of the whole optimizer step, under the policy before it: one more scoring pass per
    step, where the authors' code takes each micro-batch by itself. Tokens count in H̃ as in the loss.

    Args:
        coef: α of ``L = L_PG − α·J``; 0.005 in the authors' script.
        top_p: p; 0.8 in the authors' script.
        fraction: the share of each response's tokens that are its most uncertain, at least one; 0.2 in the script.
        anchor: nats, in place of the first step's H̃. None: the first step's, which is part of the checkpoint.
    """

    method = Method(
        formula="+α·(H̃ − H̃₁)², H̃ the mean top-p entropy (p = 0.8) of each response's 20 % most uncertain positions, "
        "H̃₁ that of the first step",
        source="arXiv 2509.25133",
        certainty="code read",
        recipe="regularizer: {class_path: SIREN, init_args: {coef: 0.005, top_p: 0.8, fraction: 0.2}}",
    )
    needs_entropy = False
    reads_old_entropy = False

    def __init__(
        self, coef: Coefficient | float = 0.005, top_p: float = 0.8, fraction: float = 0.2, anchor: float | None = None
    ) -> None:
        super().__init__(coef)
        check_fraction(fraction)
        if anchor is not None:
            check_at_least("anchor", anchor, 0)
        self.restricted, self.fraction = RestrictedEntropy(top_p=top_p), fraction
        self.anchor: TrackedNumber = Anchor() if anchor is None else Constant(anchor)

    @property
    def coefficients(self) -> Mapping[str, TrackedNumber]:
        return {**super().coefficients, "anchor": self.anchor}

    def functionals(self, context: StepContext) -> Mapping[str, HeadFunctional]:
        return {"top_p_entropy": self.restricted}

    def prepare(self, step: Experience, context: StepContext) -> Experience:
        unmeasured = isinstance(self.anchor, Anchor) and not self.anchor.settled
        if not (self.coef or unmeasured):
            return step
        entropy = context.tell(step.sequences, step.temperature, {"entropy": self.restricted})["entropy"]  # [N]
        chosen = most_uncertain(entropy, step, self.fraction)
        counts = chosen.to(entropy) if step.weights is None else step.weights.to(entropy) * chosen
        present = context.ranks.mean(entropy, counts)  # H̃
        share = context.ranks.sum(counts.sum())
        if isinstance(self.anchor, Anchor) and share > 0:
            self.anchor.settle(present.item())
        if not self.coef:
            return step
        pull = (present - self.anchor.value) * chosen / share.clamp(min=1e-30)  # [N] its mean is H̃ − H̃₁
        return step.with_extra(siren_pull=pull, siren_entropy=present.expand(step.mask.shape))

    def objective(self, stats: TokenStats) -> Tensor:
        """In the sum over tokens, (H̃ − H̃₁)·(2·H̃(θ) − H̃ − H̃₁): where θ has not moved, the square and its gradient."""
        entropy, before = stats.extra["top_p_entropy"], stats.extra["siren_entropy"]
        return -stats.extra["siren_pull"] * (2 * entropy - before - self.anchor.value)


def most_uncertain(entropy: Tensor, step: Experience, fraction: float) -> Tensor:
    """``[N]`` bool: that share of each response's valid tokens which has the highest ``entropy``, at least one.

    Values that agree to 0.001 count as equal, and among these the first are chosen: rounding depends on how a rollout
    is scored.
    """

    def of_rows(_: Tensor, exists: Tensor, values: Tensor, valid: Tensor) -> Tensor:
        rounded = values.round(decimals=3).masked_fill(~(valid & exists), -torch.inf)  # [b, t]
        rank = rounded.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
        count = ((valid & exists).sum(dim=1).double() * fraction).floor().clamp(min=1)  # [b]
        return (rank < count[:, None]) & valid & exists

    (chosen,) = row_wise(of_rows, step.lengths, entropy, step.mask)
    return chosen
