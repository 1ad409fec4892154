"""Reward shaping, and the choice of groups, before advantages are computed."""

from __future__ import annotations

import torch
from torch import Tensor


def overlong_penalty(lengths: Tensor, *, max_tokens: int | Tensor, buffer_tokens: int, factor: float = 1.0) -> Tensor:
    """DAPO's soft overlong punishment (arXiv 2503.14476, eq. 13): 0 until the buffer, then linear down to ``−factor``.

    Args:
        lengths: ``[B]`` response lengths in tokens (EOS included).
        max_tokens: ``L_max``, the generation limit, of all responses or ``[B]``.
        buffer_tokens: ``L_buffer``, the last stretch before the limit.

    >>> overlong_penalty(torch.tensor([39, 48, 56]), max_tokens=56, buffer_tokens=16)
    tensor([ 0.0000, -0.5000, -1.0000])
    """
    if buffer_tokens < 1:
        raise ValueError(f"buffer_tokens must be at least 1, got {buffer_tokens}")
    return factor * ((max_tokens - buffer_tokens - lengths) / buffer_tokens).clamp(-1.0, 0.0)  # [B]


def informative_groups(accuracy: Tensor, groups: Tensor, size: int | None = None) -> Tensor:
    """DAPO's dynamic sampling: which groups have responses that differ in accuracy.

    For right (1) and wrong (0) answers: the mean accuracy is neither 0 nor 1. A group of equal fractions teaches
    nothing either.

    Args:
        accuracy: ``[B]``; groups: ``[B]`` indices 0..G-1.
        size: G; None: the largest index plus one.

    Returns:
        ``[G]`` bool.
    """
    if size is None:
        size = int(groups.max()) + 1 if groups.numel() else 0
    start = torch.full((size,), torch.inf, dtype=torch.float64, device=accuracy.device)
    lowest = start.scatter_reduce(0, groups, accuracy.double(), "amin")  # [G]
    highest = (-start).scatter_reduce(0, groups, accuracy.double(), "amax")
    return lowest < highest
