"""The variants of the policy loss that a recipe's ``surrogate`` names; the loss itself is in
:mod:`ibro_lightning.update.loss`, their formulas in :mod:`ibro_lightning.functional`."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from ibro_lightning.batches.experience import TokenStats
from ibro_lightning.errors import ConfigError
from ibro_lightning.functional import ClippedSurrogate, cispo_surrogate, gspo_surrogate
from ibro_lightning.methods import Method
from ibro_lightning.update.loss import PolicyLoss


class GSPOLoss(PolicyLoss):
    """One clipped ratio per response, the geometric mean of its tokens' ratios (arXiv 2507.18071): clip ratios near
    3e-4, with the aggregation ``seq-mean-token-mean``."""

    method = Method(
        formula="as ppo, with r = exp(mean log r) of the whole response",
        source="arXiv 2507.18071",
        certainty="paper",
        recipe="surrogate: gspo",
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
        formula="−sg(clip(r))·A·log π", source="arXiv 2506.13585", certainty="paper", recipe="surrogate: cispo"
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


Surrogate = Literal["ppo", "gspo", "cispo"]
LOSSES: dict[str, type[PolicyLoss]] = {"ppo": PolicyLoss, "gspo": GSPOLoss, "cispo": CISPOLoss}
"""The losses by their names in a recipe's ``surrogate``."""


def loss_class(surrogate: Surrogate | type[PolicyLoss]) -> type[PolicyLoss]:
    """The class that a recipe's ``surrogate`` names, or is."""
    if isinstance(surrogate, type) and issubclass(surrogate, PolicyLoss):
        return surrogate
    if surrogate not in LOSSES:
        raise ConfigError("surrogate", surrogate, f"write one of {', '.join(LOSSES)}, or a subclass of PolicyLoss")
    return LOSSES[surrogate]


def _named(result: ClippedSurrogate) -> tuple[Tensor, dict[str, Tensor]]:
    return result.loss, {f"update/{name}": tokens for name, tokens in result._asdict().items() if name != "loss"}
