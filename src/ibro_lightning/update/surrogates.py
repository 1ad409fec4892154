"""The variants of the policy loss that a recipe's ``surrogate`` names; the loss itself is in
:mod:`ibro_lightning.update.loss`, their formulas in :mod:`ibro_lightning.functional`."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from ibro_lightning.batches.experience import TokenStats
from ibro_lightning.errors import ConfigError
from ibro_lightning.functional import (
    ClippedSurrogate,
    SoftSurrogate,
    cispo_surrogate,
    dppo_surrogate,
    gmpo_surrogate,
    gspo_surrogate,
    sapo_surrogate,
)
from ibro_lightning.regularizers.method import Method
from ibro_lightning.update.loss import PolicyLoss


class GSPOLoss(PolicyLoss):
    """One clipped ratio per response, the geometric mean of its tokens' ratios (arXiv 2507.18071): clip ratios near
    3e-4, with the aggregation ``seq-mean-token-mean``."""

    method = Method(
        formula="as ppo, with r = exp(mean log r) of the whole response",
        source="arXiv 2507.18071",
        certainty="paper",
        recipe="{surrogate: gspo, aggregation: seq-mean-token-mean, clip_ratio_low: 3.0e-4, clip_ratio_high: 4.0e-4}",
    )
    zero_without_advantage = True

    def surrogate(self, stats: TokenStats) -> tuple[Tensor, dict[str, Tensor]]:
        result = gspo_surrogate(
            stats.logp,
            stats.old_logp,
            stats.advantages,
            stats.mask,
            clip_ratio_low=self.clip_ratio_low,
            clip_ratio_high=self.clip_ratio_high,
            dual_clip=self.dual_clip,
        )
        return _named(result)


class CISPOLoss(PolicyLoss):
    """``−sg(clip(r))·A·log π`` (arXiv 2506.13585): the clipped ratio is a weight, and no token loses its gradient. It
    has no dual clip; ``clip_ratio_low`` 1 means no lower bound, as in the paper."""

    method = Method(
        formula="−sg(clip(r))·A·log π",
        source="arXiv 2506.13585",
        certainty="paper",
        recipe="{surrogate: cispo, clip_ratio_low: 1, clip_ratio_high: 4}",
    )
    clip_ratio_low_may_be_one = True
    has_dual_clip = False
    zero_without_advantage = True

    def surrogate(self, stats: TokenStats) -> tuple[Tensor, dict[str, Tensor]]:
        result = cispo_surrogate(
            stats.logp,
            stats.old_logp,
            stats.advantages,
            clip_ratio_low=self.clip_ratio_low,
            clip_ratio_high=self.clip_ratio_high,
        )
        return _named(result)


class GMPOLoss(PolicyLoss):
    """One ratio per response, the geometric mean of its tokens' clipped ratios (arXiv 2507.20673): bounds of the log
    ratio near 0.4, with the aggregation ``seq-mean-token-mean``. It has no dual clip."""

    method = Method(
        formula="−A·(Π clipped r)^(1/T); the clip ratios bound log r",
        source="arXiv 2507.20673; its authors' and verl's code",
        certainty="code read",
        recipe="{surrogate: gmpo, aggregation: seq-mean-token-mean, clip_ratio_low: 0.4, clip_ratio_high: 0.4}",
    )
    has_dual_clip = False
    zero_without_advantage = True

    def surrogate(self, stats: TokenStats) -> tuple[Tensor, dict[str, Tensor]]:
        result = gmpo_surrogate(
            stats.logp,
            stats.old_logp,
            stats.advantages,
            stats.mask,
            clip_ratio_low=self.clip_ratio_low,
            clip_ratio_high=self.clip_ratio_high,
        )
        return _named(result)


class DPPOLoss(PolicyLoss):
    """``−rA``, without the tokens whose probability has moved by more than the clip ratios, which bound the binary
    total variation here (arXiv 2602.04879). It has no dual clip."""

    method = Method(
        formula="−rA, and 0 where π − π_old is above ε_high (A > 0) or below −ε_low (A < 0): binary total variation",
        source="arXiv 2602.04879; prime-rl, without its further KL",
        certainty="code read",
        recipe="{surrogate: dppo, clip_ratio_low: 0.2, clip_ratio_high: 0.2}",
    )
    clip_ratio_high_limit = 1.0  # a probability changes by less than 1
    has_dual_clip = False
    zero_without_advantage = True

    def surrogate(self, stats: TokenStats) -> tuple[Tensor, dict[str, Tensor]]:
        result = dppo_surrogate(
            stats.logp,
            stats.old_logp,
            stats.advantages,
            clip_ratio_low=self.clip_ratio_low,
            clip_ratio_high=self.clip_ratio_high,
        )
        return _named(result)


class SAPOLoss(PolicyLoss):
    """A soft gate in place of clips (arXiv 2511.20347), with the aggregation ``seq-mean-token-mean``; the curve
    ``update/gate`` is the mean factor of the gradient. It has neither clip ratios nor a dual clip: for temperatures
    other than the paper's, write a subclass."""

    method = Method(
        formula="−(4/τ)·σ(τ(r − 1))·A; τ is 1 for A > 0 and 1.05 for A < 0",
        source="arXiv 2511.20347; TRL and verl",
        certainty="code read",
        recipe="{surrogate: sapo, aggregation: seq-mean-token-mean}",
    )
    positive_temperature = 1.0
    negative_temperature = 1.05
    has_clip_ratios = False
    has_dual_clip = False
    zero_without_advantage = True

    def surrogate(self, stats: TokenStats) -> tuple[Tensor, dict[str, Tensor]]:
        result = sapo_surrogate(
            stats.logp,
            stats.old_logp,
            stats.advantages,
            positive_temperature=self.positive_temperature,
            negative_temperature=self.negative_temperature,
        )
        return _named(result)


Surrogate = Literal["ppo", "gspo", "cispo", "gmpo", "dppo", "sapo"]
LOSSES: dict[str, type[PolicyLoss]] = {
    "ppo": PolicyLoss,
    "gspo": GSPOLoss,
    "cispo": CISPOLoss,
    "gmpo": GMPOLoss,
    "dppo": DPPOLoss,
    "sapo": SAPOLoss,
}
"""The losses by their names in a recipe's ``surrogate``."""


def loss_class(surrogate: Surrogate | type[PolicyLoss]) -> type[PolicyLoss]:
    """The class that a recipe's ``surrogate`` names, or is."""
    if isinstance(surrogate, type) and issubclass(surrogate, PolicyLoss):
        return surrogate
    if surrogate not in LOSSES:
        raise ConfigError("surrogate", surrogate, f"write one of {', '.join(LOSSES)}, or a subclass of PolicyLoss")
    return LOSSES[surrogate]


def _named(result: ClippedSurrogate | SoftSurrogate) -> tuple[Tensor, dict[str, Tensor]]:
    return result.loss, {f"update/{name}": tokens for name, tokens in result._asdict().items() if name != "loss"}
