"""Which policy loss: one place for the names that recipes use."""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

from ibro_lightning.errors import ConfigError
from ibro_lightning.experience import TokenStats
from ibro_lightning.functional import ClippedSurrogate, cispo_surrogate, clipped_surrogate, gspo_surrogate

Surrogate = Literal["ppo", "gspo", "cispo"]


class Clips(NamedTuple):
    """Bounds of the probability ratio, [1 − low, 1 + high], and of the loss of negative advantages."""

    low: float
    high: float
    dual: float | None


def check_surrogate(name: Surrogate, clips: Clips) -> None:
    """Raise :class:`ConfigError` for an unknown loss or bounds that make no sense."""
    if name not in get_args(Surrogate):
        raise ConfigError("model.surrogate", name, f"write one of {', '.join(get_args(Surrogate))}")
    if not (0 < clips.low < 1 or (name == "cispo" and clips.low == 1)):  # CISPO's paper has no lower bound
        raise ConfigError("model.clip_ratio_low", clips.low, "write a number between 0 and 1, such as 0.2")
    if not clips.high > 0:
        raise ConfigError("model.clip_ratio_high", clips.high, "write a positive number, such as 0.28")
    if clips.dual is not None and not clips.dual > 1:
        raise ConfigError("model.dual_clip", clips.dual, "write a number above 1, such as 10, or null to switch it off")


def surrogate_loss(name: Surrogate, stats: TokenStats, clips: Clips) -> ClippedSurrogate:
    """The per-token policy loss ``[B, T]`` of a micro-batch."""
    logp, old_logp, advantages = stats.logp, stats.old_logp, stats.advantages
    low, high, dual = clips
    if name == "gspo":
        return gspo_surrogate(
            logp, old_logp, advantages, stats.mask, clip_ratio_low=low, clip_ratio_high=high, dual_clip=dual
        )
    if name == "cispo":
        return cispo_surrogate(logp, old_logp, advantages, clip_ratio_low=low, clip_ratio_high=high)
    return clipped_surrogate(logp, old_logp, advantages, clip_ratio_low=low, clip_ratio_high=high, dual_clip=dual)
