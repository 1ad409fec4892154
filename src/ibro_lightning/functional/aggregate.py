"""Reduces per-token values to one number, with the denominators of the whole optimizer step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, get_args

import torch
from torch import Tensor

AggregationMode = Literal["token-mean", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm"]
"""How per-token values become one number; see :func:`aggregation_weights`."""
Reduction = Callable[[Tensor, Tensor], Tensor]
"""``(values, mask) → scalar``, such as :func:`masked_mean`; or the same over the tokens of several processes."""


def token_mean(values: Tensor, mask: Tensor, num_tokens: Tensor | float) -> Tensor:
    """``Σ m·x / N``: DAPO's token-level aggregation (arXiv 2503.14476, eq. 12).

    Args:
        values, mask: ``[B, T]`` of one micro-batch. Values under a zero mask are ignored.
        num_tokens: ``N``, the valid tokens of the *whole step* (all micro-batches, all ranks): the sum of the
            micro-batches' results does not depend on how the step is split.
    """
    return torch.where(mask.bool(), values, 0.0).sum() / num_tokens


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean of ``values`` where ``mask`` is 1 (any common shape); 0 if there are none."""
    mask = mask.bool()
    return torch.where(mask, values, 0.0).sum() / mask.sum().clamp(min=1)


def masked_max(values: Tensor, mask: Tensor) -> Tensor:
    """Largest of ``values`` where ``mask`` is 1 (any common shape); −inf if there are none."""
    # One more element, because the maximum of nothing is an error.
    return torch.cat([torch.where(mask.bool(), values, -torch.inf).flatten(), values.new_tensor([-torch.inf])]).amax()


def masked_covariance(x: Tensor, y: Tensor, mask: Tensor, *, mean: Reduction = masked_mean) -> Tensor:
    """``mean(xy) − mean(x)·mean(y)`` over valid tokens (the population covariance).

    With ``x`` = advantages and ``y`` = entropies this is the part of the IB objective that is *not* a uniform entropy
    bonus: ``mean(A·H) = Ā·H̄ + Cov(A, H)``.
    """
    return mean((x - mean(x, mask)) * (y - mean(y, mask)), mask)


def aggregation_weights(
    mask: Tensor,
    mode: AggregationMode,
    *,
    num_tokens: Tensor | float,
    num_sequences: Tensor | float,
    max_tokens: float | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """The weights ``w`` with which ``Σ w·x`` is the aggregate of ``x``; see :func:`aggregate`.

    =========================== ==================================== ==================================
    mode                        weight of a valid token              as in
    =========================== ==================================== ==================================
    ``token-mean``              ``1 / N``                            DAPO (arXiv 2503.14476)
    ``seq-mean-token-sum``      ``1 / S``                            REINFORCE, RLOO (arXiv 2402.14740)
    ``seq-mean-token-mean``     ``1 / (S · tokens of its row)``      GRPO, GSPO (arXiv 2402.03300)
    ``seq-mean-token-sum-norm`` ``1 / (S · max_tokens)``             Dr. GRPO (arXiv 2503.20783)
    =========================== ==================================== ==================================

    Args:
        mask: ``[B, T]`` of one micro-batch. A row is never split over micro-batches.
        num_tokens, num_sequences: ``N`` and ``S``, the valid tokens, and the rows with at least one of them, of the
            *whole step* (all micro-batches, all ranks), so that the parts' aggregates add up to the whole's.
        max_tokens: the constant length of Dr. GRPO, normally the generation limit; the other modes ignore it.
        dtype: of the weights; torch's default one if None.

    Returns:
        ``[B, T]``, exactly 0 under a zero mask.
    """
    if mode not in get_args(AggregationMode):
        raise ValueError(f"aggregation must be one of {', '.join(get_args(AggregationMode))}; got {mode!r}")
    mask = mask.bool()
    denominator = num_tokens if mode == "token-mean" else num_sequences
    divisor = torch.as_tensor(denominator, device=mask.device).to(dtype or torch.get_default_dtype())
    if mode == "seq-mean-token-mean":
        divisor = divisor * mask.sum(dim=1, keepdim=True)  # [B, 1]
    elif mode == "seq-mean-token-sum-norm":
        if max_tokens is None:
            raise ValueError("aggregation seq-mean-token-sum-norm needs max_tokens, the length to divide by")
        divisor = divisor * max_tokens
    # Selected rather than multiplied: the weight of an empty row or step is 1/0, and inf·0 would be nan.
    return torch.where(mask, divisor.reciprocal(), 0.0)


def aggregate(
    values: Tensor,
    mask: Tensor,
    mode: AggregationMode,
    *,
    num_tokens: Tensor | float,
    num_sequences: Tensor | float,
    max_tokens: float | None = None,
) -> Tensor:
    """``Σ w·x`` with the weights of :func:`aggregation_weights`, which explains the arguments; in at least float32.
    Values under a zero mask are ignored, even nan and inf, and get a gradient of exactly 0.

    >>> values, mask = torch.tensor([[1.0, 2.0, 3.0], [6.0, 0.0, 0.0]]), torch.tensor([[1, 1, 1], [1, 0, 0]])
    >>> aggregate(values, mask, "token-mean", num_tokens=4, num_sequences=2)
    tensor(3.)
    >>> aggregate(values, mask, "seq-mean-token-mean", num_tokens=4, num_sequences=2)
    tensor(4.)
    """
    dtype = torch.promote_types(values.dtype, torch.float32)
    weights = aggregation_weights(
        mask, mode, num_tokens=num_tokens, num_sequences=num_sequences, max_tokens=max_tokens, dtype=dtype
    )
    return (torch.where(mask.bool(), values, 0.0) * weights).sum()


def masked_whiten(
    values: Tensor,
    mask: Tensor,
    *,
    mean: Tensor | float | None = None,
    variance: Tensor | float | None = None,
    least_variance: Tensor | float = 0.0,
    epsilon: float = 1e-8,
) -> Tensor:
    """``(x − mean) / sqrt(variance + ε)`` over valid tokens, so that they have mean 0 and variance 1.

    Args:
        values, mask: any common shape. Values under a zero mask are ignored, even nan and inf.
        mean: over the valid tokens of all ranks; over those of ``values`` if None.
        variance: likewise; if None the mean of ``(x − mean)²`` (divided by n, not n − 1).
        least_variance: a lower bound of the variance; where it applies, the result has a variance below 1.
        epsilon: keeps equal values at about 0 rather than 0/0.

    Returns:
        The shape and dtype of ``values``, exactly 0 under a zero mask.
    """
    mask = mask.bool()
    # In float64: rewards with a large common part (a length, a score of 10,000) would lose their differences.
    x = torch.where(mask, values, 0.0).double()
    centre = masked_mean(x, mask) if mean is None else torch.as_tensor(mean, device=x.device).double()
    spread = masked_mean((x - centre) ** 2, mask) if variance is None else variance
    spread, least = (torch.as_tensor(value, device=x.device).double() for value in (spread, least_variance))
    spread = torch.maximum(spread, least)
    dtype = values.dtype if values.is_floating_point() else torch.get_default_dtype()
    return torch.where(mask, (x - centre) / (spread + epsilon).sqrt(), 0.0).to(dtype)


def explained_variance(
    values: Tensor, returns: Tensor, mask: Tensor, *, mean: Reduction = masked_mean, largest: Reduction = masked_max
) -> Tensor:
    """``1 − Var(returns − values) / Var(returns)`` over valid tokens: how much of the returns a critic predicts.

    1 is a perfect critic, 0 one no better than a constant; a bad one is below 0. A constant error does not count.
    The result is 0 if the returns are all equal or there are none.

    Args:
        values, returns, mask: any common shape. Values under a zero mask are ignored, even nan and inf.
        mean, largest: over the valid tokens, of all processes if they share the batch.
    """
    mask = mask.bool()
    # A nan outside the mask must go before the subtraction: it would reappear in the gradient.
    target = torch.where(mask, returns, 0.0).double()
    error = target - torch.where(mask, values, 0.0).double()
    total = masked_covariance(target, target, mask, mean=mean)
    # By the extremes: the variance of equal values, such as three times 0.1, is a rounding error and not 0.
    varies = -largest(-target, mask) < largest(target, mask)
    explained = 1.0 - masked_covariance(error, error, mask, mean=mean) / torch.where(varies, total, 1.0)
    dtype = torch.promote_types(values.dtype, torch.float32)
    return torch.where(varies, explained, 0.0).to(dtype)
