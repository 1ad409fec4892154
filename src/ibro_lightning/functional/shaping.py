"""What happens to rewards and groups before advantages are computed."""

from __future__ import annotations

import torch
from torch import Tensor


def overlong_penalty(lengths: Tensor, *, max_tokens: int, buffer_tokens: int, factor: float = 1.0) -> Tensor:
    """DAPO's soft overlong punishment (arXiv 2503.14476, eq. 13): 0 until the buffer, then linear down to ``−factor``.

    Args:
        lengths: ``[B]`` response lengths in tokens (EOS included).
        max_tokens: ``L_max``, the generation limit; ``buffer_tokens``: ``L_buffer``, the last stretch before it.

    >>> overlong_penalty(torch.tensor([39, 48, 56]), max_tokens=56, buffer_tokens=16)
    tensor([ 0.0000, -0.5000, -1.0000])
    """
    excess = lengths.to(torch.get_default_dtype()) - (max_tokens - buffer_tokens)
    return factor * (-excess / buffer_tokens).clamp(-1.0, 0.0)


def informative_groups(accuracy: Tensor, groups: Tensor) -> Tensor:
    """DAPO's dynamic sampling: which groups have responses that are neither all right nor all wrong.

    Args:
        accuracy: ``[B]``, 1 right and 0 wrong (fractions are allowed); ``groups``: ``[B]`` indices 0..G-1.

    Returns:
        ``[G]`` bool: True where the mean accuracy lies strictly between 0 and 1.
    """
    size = int(groups.max()) + 1 if groups.numel() else 0
    accuracy = accuracy.double()
    zeros = torch.zeros(size, dtype=torch.float64, device=accuracy.device)
    mean = zeros.index_add(0, groups, accuracy) / zeros.index_add(0, groups, torch.ones_like(accuracy))
    return (mean > 0) & (mean < 1)
