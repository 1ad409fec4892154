"""Corrections for a sampler whose probabilities differ from the trainer's (other kernels, precision or weights)."""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from ibro_lightning.functional.aggregate import Reduction, masked_max, masked_mean

MismatchLevel = Literal["token", "sequence", "geometric"]
"""What a ratio belongs to: a token, a response, or a response as the geometric mean of its tokens."""
MismatchMode = Literal["truncate", "mask"]
"""What happens to a ratio out of bounds: it is cut to the bound, or its token or response is dropped."""


class MismatchWeights(NamedTuple):
    """Result of :func:`mismatch_weights`; all fields ``[B, T]``."""

    weights: Tensor
    """Factors of each token's policy loss; detached; 0 on padding, where masked out and where not finite."""
    masked: Tensor
    """bool: valid tokens that were dropped for a ratio out of bounds. They still count in the loss's denominator."""
    non_finite: Tensor
    """bool: valid tokens without a ratio, since a log-prob is not finite. Leave them out of the denominator, too."""


def mismatch_weights(
    train_logp: Tensor,
    sampler_logp: Tensor,
    mask: Tensor,
    *,
    level: MismatchLevel = "token",
    mode: MismatchMode = "truncate",
    cap: float = 2.0,
    floor: float | None = None,
    max_difference: float | None = None,
) -> MismatchWeights:
    """Importance weights ``w = π_trainer / π_sampler`` for a policy gradient on the sampler's tokens.

    ``token`` and ``truncate``: truncated importance sampling (Yao et al., *Your efficient RL framework secretly brings
    you off-policy RL training*, 2025). ``token`` and ``mask``: IcePop (arXiv 2510.18855). ``sequence``: the exact
    ratio of the response; ``geometric``: its root of degree length, comparable between lengths.

    Args:
        train_logp: ``[B, T]`` of the trainer, with the weights that the sampler had (``old_logp``, not the current).
        sampler_logp: ``[B, T]``, as reported by the sampler. A token for which either one is not finite has no ratio:
            its weight is 0, the ratio of its row ignores it, and ``non_finite`` marks it.
        mask: ``[B, T]``, 1 on response tokens. Everything else is ignored, even nan.
        level: ``token``: each token's own ratio. ``sequence``: the product over the row's valid tokens, for each of
            them. ``geometric``: the geometric mean of these, for each of them.
        mode: ``truncate``: ``min(w, cap)``. ``mask``: ``w`` inside ``[floor, cap]`` and 0 outside.
        cap: upper bound of a ratio.
        floor: lower bound in mode ``mask``, which alone has one; ``1 / cap`` if None.
        max_difference: a row whose ``mean_t |log w_t|`` over its valid tokens is above this, in nats, is dropped whole,
            whatever ``level`` and ``mode`` are. Unlike the mean of ``geometric``, that of absolute values does not let
            tokens of either sign cancel. None: no row is.
    """
    _check(level, mode, cap, floor, max_difference)
    mask = mask.bool()
    log_ratio, non_finite = _log_ratio(train_logp, sampler_logp, mask)
    mask = mask & ~non_finite
    dropped = torch.zeros_like(mask)
    if max_difference is not None:
        dropped = mask & mismatched_rows(train_logp, sampler_logp, mask, max_difference)[:, None]
    if level != "token":
        row = log_ratio.sum(dim=1, keepdim=True)  # [B, 1]
        if level == "geometric":
            row = row / mask.sum(dim=1, keepdim=True).clamp(min=1)
        log_ratio = row.expand_as(log_ratio)  # [B, T]
    ratio = log_ratio.clamp(-20.0, 20.0).exp()
    if mode == "truncate":
        return MismatchWeights(torch.where(mask & ~dropped, ratio.clamp(max=cap), 0.0), dropped, non_finite)
    outside = (ratio < (1.0 / cap if floor is None else floor)) | (ratio > cap) | dropped
    return MismatchWeights(torch.where(mask & ~outside, ratio, 0.0), mask & outside, non_finite)


def mismatched_rows(train_logp: Tensor, sampler_logp: Tensor, mask: Tensor, max_difference: float) -> Tensor:
    """``[B]`` bool: the rows whose ``mean_t |log w_t|`` over their valid tokens is above ``max_difference``, in nats.

    Args:
        train_logp, sampler_logp, mask: ``[B, T]``, as for :func:`mismatch_weights`.
    """
    mask = mask.bool()
    log_ratio, non_finite = _log_ratio(train_logp, sampler_logp, mask)
    return log_ratio.abs().sum(dim=1) / (mask & ~non_finite).sum(dim=1).clamp(min=1) > max_difference


def mismatch_diagnostics(
    train_logp: Tensor,
    sampler_logp: Tensor,
    mask: Tensor,
    result: MismatchWeights | None = None,
    *,
    mean: Reduction = masked_mean,
    largest: Reduction = masked_max,
) -> dict[str, Tensor]:
    """The mismatch of trainer and sampler over the valid tokens, *before* any truncation or masking.

    Tokens with a log-prob that is not finite are counted, and left out of everything else.

    Args:
        train_logp, sampler_logp, mask: ``[B, T]``, as for :func:`mismatch_weights`.
        result: of :func:`mismatch_weights` for them, for ``masked_share``.
        mean, largest: over the valid tokens, of all processes if they share the batch.

    Returns:
        Scalars; without a valid token, those of no mismatch (the ratios and the sample size 1, the rest 0).

        - ``ratio_mean``, ``ratio_max``: of the token ratios ``w = π_trainer/π_sampler``; the mean should be near 1.
        - ``effective_sample_size``: ``(Σw)² / (n·Σw²)``, the effective share of the n tokens.
        - ``kl_k1``, ``kl_k3``: estimates of ``KL(π_sampler ‖ π_trainer)`` per token in nats, both unbiased (the tokens
          are the sampler's); k3 has less variance and is never negative.
        - ``non_finite``: the number of tokens with a log-prob that is not finite.
        - ``masked_share``: the share of tokens that ``result`` dropped; 0 without it.
    """
    mask = mask.bool()
    log_ratio, non_finite = _log_ratio(train_logp, sampler_logp, mask)
    mask = mask & ~non_finite
    log_ratio = log_ratio.clamp(-20.0, 20.0)
    ratio = log_ratio.exp()
    most = largest(ratio, mask)
    empty = most == -torch.inf  # a ratio is never negative
    masked = torch.zeros_like(mask) if result is None else result.masked
    return {
        "ratio_mean": torch.where(empty, 1.0, mean(ratio, mask)),
        "ratio_max": torch.where(empty, 1.0, most),
        "effective_sample_size": torch.where(empty, 1.0, mean(ratio, mask) ** 2 / mean(ratio**2, mask)),
        "kl_k1": mean(-log_ratio, mask),
        "kl_k3": mean(log_ratio.expm1() - log_ratio, mask),
        "non_finite": non_finite.sum().to(ratio.dtype),
        "masked_share": mean(masked.to(ratio.dtype), mask),
    }


def _check(level: str, mode: str, cap: float, floor: float | None, max_difference: float | None) -> None:
    for name, value, allowed in (("level", level, MismatchLevel), ("mode", mode, MismatchMode)):
        if value not in get_args(allowed):
            raise ValueError(f"{name} must be one of {', '.join(get_args(allowed))}; got {value!r}")
    if not cap > 0:
        raise ValueError(f"cap must be larger than 0, got {cap}")
    if floor is not None and mode == "truncate":
        raise ValueError(f"floor is a bound of mode 'mask'; mode 'truncate' has only a cap (got floor {floor})")
    if max_difference is not None and not max_difference > 0:
        raise ValueError(f"max_difference must be larger than 0, got {max_difference}")
    lowest = 1.0 / cap if floor is None else floor
    if mode == "mask" and lowest > cap:
        raise ValueError(f"floor must not be larger than cap, got floor {lowest} and cap {cap}")


def _log_ratio(train_logp: Tensor, sampler_logp: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Detached log-ratios ``[B, T]`` in at least float32, 0 on padding and where not finite; and the latter places."""
    dtype = torch.promote_types(torch.promote_types(train_logp.dtype, sampler_logp.dtype), torch.float32)
    train_logp, sampler_logp = train_logp.detach().to(dtype), sampler_logp.detach().to(dtype)
    finite = train_logp.isfinite() & sampler_logp.isfinite()
    return torch.where(mask & finite, train_logp - sampler_logp, 0.0), mask & ~finite
