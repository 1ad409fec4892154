"""The clipped policy-gradient objective of PPO and DAPO, per token, and its variants."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor


class ClippedSurrogate(NamedTuple):
    """Per-token result of :func:`clipped_surrogate` and its variants; all fields ``[B, T]``.

    In :func:`cispo_surrogate` the flagged tokens keep their gradient.
    """

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

    The log-ratio is clamped to ±20 before ``exp``, so that a token that became impossible cannot give an infinite loss.
    Training computes the same in :meth:`ibro_lightning.update.PolicyLoss.surrogate`, written out; this is for loops of
    your own.
    """
    ratio = (logp - old_logp).clamp(-20.0, 20.0).exp()
    return _clip(ratio, advantages, clip_ratio_low, clip_ratio_high, dual_clip)


def gspo_surrogate(
    logp: Tensor,
    old_logp: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    clip_ratio_low: float = 3e-4,
    clip_ratio_high: float = 4e-4,
    dual_clip: float | None = None,
) -> ClippedSurrogate:
    """:func:`clipped_surrogate` with one ratio per response, ``s = exp(mean_t(logp − old_logp))``.

    GSPO (arXiv 2507.18071) in its token form: ``s_t = sg(s)·exp(logp_t − sg(logp_t))`` has the value of ``s``
    for each token, so a response is clipped as a whole. Aggregated with ``seq-mean-token-mean`` the loss and its
    gradient are those of ``max(−sA, −clip(s)A)`` averaged over responses; another aggregation weights them by length.

    Args:
        logp, old_logp, dual_clip: as in :func:`clipped_surrogate`.
        advantages: likewise; GSPO's are equal along a row.
        mask: ``[B, T]``, 1 on response tokens. Everything else is ignored, even nan.
        clip_ratio_low, clip_ratio_high: ε of the paper; far smaller than PPO's since ``s`` is a geometric mean.

    Returns:
        All fields ``[B, T]``, with loss 0, no flags and no gradient under a zero mask. Log-ratios are clamped to ±20.
    """
    mask = mask.bool()
    logp, old_logp = (_finite(torch.where(mask, x, 0.0)) for x in (logp, old_logp))
    log_ratio = (logp - old_logp).detach().clamp(-20.0, 20.0)  # [B, T]
    sequence = (log_ratio.sum(dim=1, keepdim=True) / mask.sum(dim=1, keepdim=True).clamp(min=1)).exp()
    ratio = sequence * (logp - logp.detach()).exp()  # [B, T]
    return _clip(ratio, torch.where(mask, advantages, 0.0), clip_ratio_low, clip_ratio_high, dual_clip)


def cispo_surrogate(
    logp: Tensor, old_logp: Tensor, advantages: Tensor, *, clip_ratio_low: float = 1.0, clip_ratio_high: float = 4.0
) -> ClippedSurrogate:
    """``−sg(clip(r, 1−ε_low, 1+ε_high))·A·logp``: CISPO (arXiv 2506.13585, eq. 4-5), REINFORCE with clipped weights.

    Unlike in PPO the *weight* is clipped and not the token: every token keeps a gradient, that of ``−weight·A·logp``.

    Args:
        logp, old_logp, advantages: as in :func:`clipped_surrogate`.
        clip_ratio_low: 1 or more means no lower bound.
        clip_ratio_high: one less than the largest weight.

    Returns:
        All fields ``[B, T]``. ``clipped_low`` and ``clipped_high`` mark tokens whose weight was clipped, whatever the
        sign of their advantage; **these tokens still have a gradient**. ``clipped_dual`` is all False. Only the
        gradient of the loss has a meaning, not its value (on policy it is ``−A·logp``). A token with ``logp = −inf``
        gets loss 0 and no gradient.
    """
    # −inf would make the loss infinite however small its weight.
    possible = torch.where(logp == -torch.inf, 0.0, logp)
    ratio = (_finite(logp) - _finite(old_logp)).detach().clamp(-20.0, 20.0).exp()
    low, high = 1.0 - clip_ratio_low, 1.0 + clip_ratio_high
    loss = -ratio.clamp(low, high) * advantages * possible
    return ClippedSurrogate(loss, ratio < low, ratio > high, torch.zeros_like(ratio, dtype=torch.bool))


def gmpo_surrogate(
    logp: Tensor,
    old_logp: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    clip_ratio_low: float = 0.4,
    clip_ratio_high: float = 0.4,
) -> ClippedSurrogate:
    """One ratio per response, the geometric mean of its tokens' *clipped* ratios: GMPO (arXiv 2507.20673).

    A token's log-ratio is cut to ``[−ε_low, ε_high]``, pessimistically as in PPO: from above where A > 0, from below
    where A < 0. Otherwise as :func:`gspo_surrogate`, which clips the mean and not the tokens: of its tokens only the
    clipped ones lose their gradient. Aggregate with ``seq-mean-token-mean``.

    Args:
        logp, old_logp, advantages, mask: as in :func:`gspo_surrogate`.
        clip_ratio_low, clip_ratio_high: bounds of the *log*-ratio; 0.4 in the paper.

    Returns:
        All fields ``[B, T]``, with loss 0, no flags and no gradient under a zero mask. ``clipped_dual`` is all False.
    """
    mask = mask.bool()
    logp, old_logp = (_finite(torch.where(mask, x, 0.0)) for x in (logp, old_logp))
    advantages = torch.where(mask, advantages, 0.0)
    log_ratio = (logp - old_logp).clamp(-20.0, 20.0)  # [B, T]
    high, low = (advantages > 0) & (log_ratio > clip_ratio_high), (advantages < 0) & (log_ratio < -clip_ratio_low)
    log_ratio = torch.where(high, clip_ratio_high, torch.where(low, -clip_ratio_low, log_ratio))
    fixed = log_ratio.detach()
    sequence = (fixed.sum(dim=1, keepdim=True) / mask.sum(dim=1, keepdim=True).clamp(min=1)).exp()
    ratio = sequence * (log_ratio - fixed).exp()  # [B, T]
    return ClippedSurrogate(-ratio * advantages, low, high, torch.zeros_like(low))


def dppo_surrogate(
    logp: Tensor, old_logp: Tensor, advantages: Tensor, *, clip_ratio_low: float = 0.2, clip_ratio_high: float = 0.2
) -> ClippedSurrogate:
    """``−rA`` where the probability itself has not moved too far: DPPO with binary total variation (arXiv 2602.04879).

    The total variation between π and π_old of "this token or another one" is ``|π − π_old|``. A token leaves the loss
    where ``π − π_old > ε_high`` and A > 0, or ``π − π_old < −ε_low`` and A < 0. Unlike a clip of the ratio, this lets
    unlikely tokens change by large factors, and likely ones by small ones only. verl and TRL cap the ratio at 20,
    prime-rl does not, nor is it done here.

    Args:
        logp, old_logp, advantages: as in :func:`clipped_surrogate`.
        clip_ratio_low, clip_ratio_high: bounds of the change of the *probability*; 0.2 in prime-rl.

    Returns:
        All fields ``[B, T]``; flagged tokens have loss 0. ``clipped_dual`` is all False.
    """
    logp, old_logp = _finite(logp), _finite(old_logp)
    moved = (logp.exp() - old_logp.exp()).detach()
    high, low = (advantages > 0) & (moved > clip_ratio_high), (advantages < 0) & (moved < -clip_ratio_low)
    loss = -(logp - old_logp).clamp(-20.0, 20.0).exp() * advantages
    return ClippedSurrogate(torch.where(high | low, 0.0, loss), low, high, torch.zeros_like(low))


class SoftSurrogate(NamedTuple):
    """Per-token result of :func:`sapo_surrogate`; both fields ``[B, T]``."""

    loss: Tensor
    """To be minimised; carries the gradient."""
    gate: Tensor
    """The factor of the gradient, between 0 and 1: that of ``−rA`` times this."""


def sapo_surrogate(
    logp: Tensor,
    old_logp: Tensor,
    advantages: Tensor,
    *,
    positive_temperature: float = 1.0,
    negative_temperature: float = 1.05,
) -> SoftSurrogate:
    """``−(4/τ)·σ(τ(r − 1))·A``: SAPO (arXiv 2511.20347), a soft gate in place of a clip.

    The gradient is that of ``−rA`` times ``4σ(1 − σ)``: 1 on policy, and smaller the further r is from 1. Aggregate
    with ``seq-mean-token-mean``, as its authors do.

    Args:
        logp, old_logp, advantages: as in :func:`clipped_surrogate`.
        positive_temperature, negative_temperature: τ where A > 0, and elsewhere: a larger one fades sooner.
    """
    for name, value in (("positive", positive_temperature), ("negative", negative_temperature)):
        if not 0 < value < math.inf:
            raise ValueError(f"{name}_temperature must be a positive number, got {value}")
    ratio = (_finite(logp) - _finite(old_logp)).clamp(-20.0, 20.0).exp()
    positive, negative = ratio.new_tensor(positive_temperature), ratio.new_tensor(negative_temperature)
    temperature = torch.where(advantages > 0, positive, negative)  # [B, T]
    soft = (temperature * (ratio - 1.0)).sigmoid()
    return SoftSurrogate(-soft * 4.0 / temperature * advantages, (4.0 * soft * (1.0 - soft)).detach())


def _finite(logp: Tensor) -> Tensor:
    """An impossible token (−inf) as a very unlikely one: −inf − (−inf) would be nan."""
    return logp.clamp(min=torch.finfo(logp.dtype).min)


def _clip(
    ratio: Tensor, advantages: Tensor, clip_ratio_low: float, clip_ratio_high: float, dual_clip: float | None
) -> ClippedSurrogate:
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
