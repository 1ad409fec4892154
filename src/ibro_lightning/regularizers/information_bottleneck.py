"""IB regularisation: entropy times advantage (arXiv 2507.18391)."""

from __future__ import annotations

from typing import Literal, get_args

from torch import Tensor

from ibro_lightning.errors import ConfigError
from ibro_lightning.regularizers.base import EntropyRegularizer
from ibro_lightning.types import TokenStats

AdvantageTransform = Literal["none", "sign", "clip"]


class InformationBottleneck(EntropyRegularizer):
    """``J_IB = agg(sg(A_t)·H_t)``: keep entropy on tokens that led to success, remove it where they led to failure.

    The paper weighs a token's entropy by ``λ_t ∈ [−1, 1]`` from the answer-conditioned entropy and then sets ``λ_t ≈
    −A_t``, which costs one product. The term has no clipping and no importance weight: a token whose ratio is clipped
    still receives it. In DAPO ``A_t`` is one number per response, so a group whose rewards are all equal contributes
    nothing, and on the first response token, where a full group shares one state, the term cancels.

    Args:
        coef: α of ``L = L_PG − α·J_IB``; 0.005 in the paper.
        transform: what is done to the advantage first. ``none``; ``sign`` (only its direction); ``clip`` to ±``clip``.
        clip: bound for ``transform: clip``.
    """

    def __init__(self, coef: float = 0.005, transform: AdvantageTransform = "none", clip: float = 1.0) -> None:
        super().__init__(coef)
        if transform not in get_args(AdvantageTransform):
            raise ConfigError("regularizer.init_args.transform", transform, "write none, sign or clip")
        if not 0 < clip < float("inf"):
            raise ConfigError("regularizer.init_args.clip", clip, "write a positive bound for the advantage")
        self.transform, self.clip = transform, clip

    def objective(self, stats: TokenStats) -> Tensor:
        assert stats.entropy is not None
        weight = stats.advantages.detach()
        if self.transform == "sign":
            weight = weight.sign()
        elif self.transform == "clip":
            weight = weight.clamp(-self.clip, self.clip)
        return weight * stats.entropy
