"""The clipped policy-gradient objective of PPO and DAPO, per token."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class ClippedSurrogate(NamedTuple):
    """Per-token result of :func:`clipped_surrogate`; all fields ``[B, T]``."""

    loss: Tensor
    """To be minimised; carries the gradient."""
    clipped_low: Tensor
    """bool: the lower bound was active (A < 0 and the ratio fell below it), so the token has no gradient."""
    clipped_high: Tensor
    """bool: the upper bound was active (A > 0 and the ratio rose above it), so the token has no gradient."""
    clipped_dual: Tensor
    """bool: the dual clip was active (A < 0 and the ratio exceeded ``dual_clip``), so the token has no gradient."""


def clipped_surrogate(
    logp: Tensor,
    old_logp: Tensor,
    advantages: Tensor,
    *,
    clip_ratio_low: float = 0.2,
    clip_ratio_high: float = 0.28,
    dual_clip: float | None = 10.0,
) -> ClippedSurrogate:
    """``max(−rA, −clip(r, 1−ε_low, 1+ε_high)A)`` with ``r = exp(logp − old_logp)``; for A < 0 at most ``−cA``.

    Args:
        logp: ``[B, T]`` log-probs of the response tokens under the current policy (gradient flows here).
        old_logp: ``[B, T]`` under the policy that the rollout came from.
        advantages: ``[B, T]`` or broadcastable.
        clip_ratio_low, clip_ratio_high: ε of PPO (arXiv 1707.06347); different values are DAPO's clip-higher.
        dual_clip: ``c`` of dual-clip PPO (arXiv 1912.09729), larger than 1; None switches it off.

    The log-ratio is cut to ±20 before ``exp`` so that a token which became impossible cannot turn the loss into inf.
    """
    ratio = (logp - old_logp).clamp(-20.0, 20.0).exp()
    unclipped = -ratio * advantages
    clipped = -ratio.clamp(1.0 - clip_ratio_low, 1.0 + clip_ratio_high) * advantages
    loss = torch.maximum(unclipped, clipped)
    clipped_low = (advantages < 0) & (ratio < 1.0 - clip_ratio_low)
    clipped_high = (advantages > 0) & (ratio > 1.0 + clip_ratio_high)
    clipped_dual = torch.zeros_like(clipped_low)
    if dual_clip is not None:
        clipped_dual = (advantages < 0) & (ratio > dual_clip)
        loss = torch.where(advantages < 0, torch.minimum(loss, -dual_clip * advantages), loss)
    return ClippedSurrogate(loss, clipped_low, clipped_high, clipped_dual)


def approximate_kl(logp: Tensor, old_logp: Tensor) -> Tensor:
    """Per-token k3 estimate of ``KL(π_old ‖ π)`` in nats: ``r − 1 − log r``, never negative, low variance.

    Unbiased for tokens sampled from ``π_old`` (Schulman, *Approximating KL Divergence*, 2020). ``[B, T]`` in and out.
    """
    log_ratio = (logp - old_logp).clamp(-20.0, 20.0)
    return log_ratio.expm1() - log_ratio  # exp(x) − 1 cancels for small x, and k3 would come out negative
