"""From per-token values to one number, with denominators that belong to the whole optimizer step."""

from __future__ import annotations

import torch
from torch import Tensor


def token_mean(values: Tensor, mask: Tensor, num_tokens: Tensor | float) -> Tensor:
    """``Σ m·x / N``: DAPO's token-level aggregation (arXiv 2503.14476, eq. 12).

    Args:
        values, mask: ``[B, T]`` of one micro-batch. Values under a zero mask are ignored.
        num_tokens: ``N``, the valid tokens of the *whole step* (all micro-batches, all ranks). Given this, the sum of
            the micro-batches' results does not depend on how the step was cut.

    Returns:
        A scalar; 0 for a micro-batch without valid tokens.
    """
    return torch.where(mask.bool(), values, 0.0).sum() / num_tokens


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean of ``values`` where ``mask`` is 1 (any common shape); 0 if there is no such place."""
    mask = mask.bool()
    return torch.where(mask, values, 0.0).sum() / mask.sum().clamp(min=1)


def masked_covariance(x: Tensor, y: Tensor, mask: Tensor) -> Tensor:
    """``mean(xy) − mean(x)·mean(y)`` over valid tokens (the population covariance).

    With ``x`` = advantages and ``y`` = entropies this is the part of the IB objective that is *not* a uniform entropy
    bonus: ``mean(A·H) = Ā·H̄ + Cov(A, H)``.
    """
    return masked_mean((x - masked_mean(x, mask)) * (y - masked_mean(y, mask)), mask)
