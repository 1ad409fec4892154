"""The policy gradient averages over the sampler's tokens, and the sampler is not quite the policy: a correction."""

from __future__ import annotations

from dataclasses import dataclass
from typing import get_args

from torch import Tensor

from ibro_lightning.errors import ConfigError
from ibro_lightning.functional import (
    MismatchLevel,
    MismatchMode,
    MismatchWeights,
    mismatch_diagnostics,
    mismatch_weights,
)
from ibro_lightning.ranks import ALONE, Ranks


@dataclass(frozen=True)
class SamplerCorrection:
    """Importance weights ``w = π_old / π_sampler`` on the policy loss, bounded; see
    :func:`~ibro_lightning.functional.mismatch_weights`.

    The default is truncated importance sampling per token. ``mode: mask`` is IcePop; ``level: sequence`` and
    ``geometric`` weigh (or drop) whole responses.

    Args:
        level: what a ratio belongs to: ``token``, ``sequence`` (the product) or ``geometric`` (the tokens' mean).
        mode: ratios out of bounds are cut (``truncate``), or their tokens dropped (``mask``).
        cap: largest ratio.
        floor: smallest one of ``mask``; None means 1 / cap.
    """

    level: MismatchLevel = "token"
    mode: MismatchMode = "truncate"
    cap: float = 2.0
    floor: float | None = None

    def __post_init__(self) -> None:
        for name, known in (("level", MismatchLevel), ("mode", MismatchMode)):
            if getattr(self, name) not in get_args(known):
                value, remedy = getattr(self, name), f"write one of {', '.join(get_args(known))}"
                raise ConfigError(f"model.sampler_correction.{name}", value, remedy)
        if not self.cap >= 1:
            raise ConfigError("model.sampler_correction.cap", self.cap, "write 1 or more: equal log-probs have ratio 1")
        if self.floor is not None and (self.mode == "truncate" or not 0 <= self.floor <= 1):
            raise ConfigError(
                "model.sampler_correction.floor",
                self.floor,
                "it is a bound of mode mask: write a number from 0 to 1, or null",
            )

    def __call__(self, old_logp: Tensor, sampler_logp: Tensor, mask: Tensor) -> MismatchWeights:
        """Weights and dropped tokens, ``[B, T]``."""
        return mismatch_weights(
            old_logp, sampler_logp, mask, level=self.level, mode=self.mode, cap=self.cap, floor=self.floor
        )


def mismatch_metrics(
    correction: SamplerCorrection | None, old_logp: Tensor, sampler_logp: Tensor, mask: Tensor, ranks: Ranks = ALONE
) -> dict[str, Tensor]:
    """How far trainer and sampler are apart on all ranks, corrected or not, as ``sampler/…``."""
    result = None if correction is None else correction(old_logp, sampler_logp, mask)
    measured = mismatch_diagnostics(old_logp, sampler_logp, mask, result, mean=ranks.mean, largest=ranks.largest)
    measured["non_finite"] = ranks.sum(measured["non_finite"])
    return {f"sampler/{name}": value for name, value in measured.items()}
