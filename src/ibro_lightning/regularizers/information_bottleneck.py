"""IB regularisation: entropy times advantage (arXiv 2507.18391), its two parts, and its opposite."""

from __future__ import annotations

from typing import Literal, get_args

from torch import Tensor

from ibro_lightning.coefficients import Coefficient
from ibro_lightning.errors import ConfigError
from ibro_lightning.experience import Experience, StepContext, TokenStats
from ibro_lightning.regularizers.base import EntropyRegularizer

AdvantageTransform = Literal["none", "sign", "clip"]
Part = Literal["raw", "centred", "uniform"]


class InformationBottleneck(EntropyRegularizer):
    """``J_IB = agg(sg(A_t)·H_t)``: keep entropy on tokens that led to success, remove it where they led to failure.

    The paper weighs a token's entropy by ``λ_t ∈ [−1, 1]`` from the answer-conditioned entropy and then sets ``λ_t ≈
    −A_t``, which costs one product. The term has no clipping and no importance weight: a token whose ratio is clipped
    still receives it. In DAPO ``A_t`` is one number per response, so a group whose rewards are all equal contributes
    nothing, and on the first response token, where a full group shares one state, the term cancels.

    ``mean(A·H) = Ā·H̄ + Cov(A, H)``: the first part is a *uniform* entropy bonus or penalty, the second is what the
    paper is about. ``part`` keeps one of them, to tell which one an effect comes from.

    Args:
        coef: α of ``L = L_PG − α·J_IB``; 0.005 in the paper.
        part: ``raw`` is A·H; ``centred`` is (A − Ā)·H, the covariance alone; ``uniform`` is Ā·H. Ā is the mean over the
            tokens of the optimizer step, each counted as in the loss.
        transform: what is done to the advantage first. ``none``; ``sign`` (only its direction); ``clip`` to ±``clip``.
        clip: bound for ``transform: clip``.
    """

    def __init__(
        self,
        coef: Coefficient | float = 0.005,
        part: Part = "raw",
        transform: AdvantageTransform = "none",
        clip: float = 1.0,
    ) -> None:
        super().__init__(coef)
        if part not in get_args(Part):
            raise ConfigError("regularizer.init_args.part", part, "write raw, centred or uniform")
        if transform not in get_args(AdvantageTransform):
            raise ConfigError("regularizer.init_args.transform", transform, "write none, sign or clip")
        if not 0 < clip < float("inf"):
            raise ConfigError("regularizer.init_args.clip", clip, "write a positive bound for the advantage")
        self.part, self.transform, self.clip = part, transform, clip

    def prepare(self, step: Experience, context: StepContext) -> Experience:
        weight = self.weight(step.advantages)
        counted = step.mask if step.weights is None else step.weights
        return step.with_extra(ib_mean_weight=context.mean(weight, counted).expand(weight.shape))

    @property
    def prepare_needs_scores(self) -> bool:
        return type(self).prepare is not InformationBottleneck.prepare  # ours reads the advantages alone

    def objective(self, stats: TokenStats) -> Tensor:
        assert stats.entropy is not None
        weight = self.weight(stats.advantages.detach())
        if self.part == "centred":
            weight = weight - stats.extra["ib_mean_weight"]
        elif self.part == "uniform":
            weight = stats.extra["ib_mean_weight"]
        return weight * stats.entropy

    def weight(self, advantages: Tensor) -> Tensor:
        """What a token's entropy is weighed with, before it is split into parts."""
        if self.transform == "sign":
            return advantages.sign()
        return advantages.clamp(-self.clip, self.clip) if self.transform == "clip" else advantages


class CorrectPathEntropySuppression(InformationBottleneck):
    """The opposite sign (CES, arXiv 2605.19358): ``J = −agg(sg(A_t)·H_t)``, less entropy where it went well.

    The sharpest ablation of IB: whatever helps with both signs does not come from the sign.
    """

    def objective(self, stats: TokenStats) -> Tensor:
        return -super().objective(stats)
