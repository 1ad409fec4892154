"""IB regularisation: entropy times advantage (arXiv 2507.18391), its two parts, and its opposite."""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Literal, get_args

from torch import Tensor

from ibro_lightning.batches.experience import Experience, TokenStats
from ibro_lightning.errors import ConfigError, check_at_least, is_number
from ibro_lightning.functional.regularization import Part, part_of
from ibro_lightning.regularizers.advantage_noise import advantage_noise
from ibro_lightning.regularizers.base import EntropyRegularizer, StepContext
from ibro_lightning.regularizers.coefficients import Coefficient
from ibro_lightning.regularizers.method import Method

AdvantageTransform = Literal["none", "sign", "clip"]


class InformationBottleneck(EntropyRegularizer):
    """``J_IB = agg(sg(A_t)·H_t)``: keep entropy on tokens that led to success, remove it where they led to failure.

    The paper weighs a token's entropy by ``λ_t ∈ [−1, 1]`` from the answer-conditioned entropy and then sets ``λ_t ≈
    −A_t``, which costs one product. The term has no clipping and no importance weight: a token whose ratio is clipped
    still receives it. In DAPO ``A_t`` is one number per response, so a group whose rewards are all equal contributes
    nothing, and on the first response token, where a full group shares one state, the term cancels.

    ``mean(A·H) = Ā·H̄ + Cov(A, H)``: the first part is a *uniform* entropy bonus or penalty, the second is the
    subject of the paper. ``part`` keeps one of them, to attribute an effect.

    Args:
        coef: α of ``L = L_PG − α·J_IB``; 0.005 in the paper.
        part: ``raw`` is A·H; ``centred`` is (A − Ā)·H, the covariance alone; ``uniform`` is Ā·H; ``reversed`` is
            (A − 2Ā)·H, the covariance with the uniform part's sign reversed. Ā is the mean over the tokens of the
            optimizer step, each counted as in the loss.
        transform: applied to the advantage first. ``none``; ``sign`` (only its direction); ``clip`` to ±``clip``.
        clip: bound for ``transform: clip``.
        noise: on the advantages of this term alone, in standard deviations of the optimizer step's own, before they are
            transformed (:func:`.advantage_noise`): how good advantages must be for the term to help.
    """

    method = Method(
        formula="−α·agg(A·H); `part: centred` (A − Ā)·H, the covariance alone; `uniform` Ā·H, the rest; "
        "`reversed` (A − 2Ā)·H; `noise` on the A of this term",
        source="arXiv 2507.18391; the parts are ours",
        certainty="paper",
        recipe="regularizer: {class_path: InformationBottleneck, init_args: {coef: 0.005, part: raw}}",
    )
    reads_old_entropy = False

    def __init__(
        self,
        coef: Coefficient | float = 0.005,
        part: Part = "raw",
        transform: AdvantageTransform = "none",
        clip: float = 1.0,
        noise: float = 0.0,
    ) -> None:
        super().__init__(coef)
        check_at_least("noise", noise, 0)
        if part not in get_args(Part):
            raise ConfigError("part", part, "write raw, centred, uniform or reversed")
        if transform not in get_args(AdvantageTransform):
            raise ConfigError("transform", transform, "write none, sign or clip")
        if not (is_number(clip) and 0 < clip < float("inf")):
            raise ConfigError("clip", clip, "write a positive bound for the advantage")
        self.part, self.transform, self.clip, self.noise = part, transform, clip, noise

    @property
    def zero_without_advantage(self) -> bool:  # type: ignore[override]
        return self.part == "raw" and not self.noise

    def prepare(self, step: Experience, context: StepContext) -> Experience:
        advantages = step.advantages
        if self.noise:
            step = step.with_extra(ib_noise=advantage_noise(step, self.noise, context.ranks, "ib"))
            advantages = advantages + step.extra["ib_noise"]
        weight = self.weight(advantages)
        mean = context.ranks.mean(weight, step.mask if step.weights is None else step.weights)  # Ā
        if self.part == "raw":  # for the curve alone
            return replace(step, metrics={**step.metrics, "regularizer/ib_mean_weight": mean.item()})
        return step.with_extra(ib_mean_weight=mean.expand(weight.shape))

    def objective(self, stats: TokenStats) -> Tensor:
        assert stats.entropy is not None
        advantages = stats.advantages.detach()  # [B, T] A
        weight = self.weight(advantages + stats.extra["ib_noise"] if self.noise else advantages)
        if self.part != "raw":
            weight = part_of(weight, stats.extra["ib_mean_weight"], self.part)
        return weight * stats.entropy

    def weight(self, advantages: Tensor) -> Tensor:
        """The weight of each token's entropy, before it is split into parts."""
        if self.transform == "sign":
            return advantages.sign()
        return advantages.clamp(-self.clip, self.clip) if self.transform == "clip" else advantages


class OppositeInformationBottleneck(InformationBottleneck):
    """IB with the opposite sign: ``J = −agg(sg(A_t)·H_t)``, less entropy after success, more after failure.

    The sharpest ablation of IB: an effect of both signs does not come from the sign. Unlike Conditional Entropy Shaping
    (arXiv 2605.19358), which chooses the uncertain tokens, it treats all tokens alike.
    """

    method = Method(
        formula="+α·agg(A·H): IB with the opposite sign",
        source="–",
        certainty="ours",
        recipe="regularizer: {class_path: OppositeInformationBottleneck, init_args: {coef: 0.005}}",
    )
    zero_without_advantage = InformationBottleneck.zero_without_advantage

    def objective(self, stats: TokenStats) -> Tensor:
        return -super().objective(stats)


class CorrectPathEntropySuppression(OppositeInformationBottleneck):
    """The former name of :class:`OppositeInformationBottleneck`, which is not the method of arXiv 2605.19358."""

    def __init__(
        self,
        coef: Coefficient | float = 0.005,
        part: Part = "raw",
        transform: AdvantageTransform = "none",
        clip: float = 1.0,
    ) -> None:
        warnings.warn(
            "CorrectPathEntropySuppression is now OppositeInformationBottleneck: it is −A·H, the opposite of IB, not "
            "the Conditional Entropy Shaping of arXiv 2605.19358. Write the new name: this one will be removed in 0.3",
            FutureWarning,
            stacklevel=2,
        )
        super().__init__(coef, part, transform, clip)
