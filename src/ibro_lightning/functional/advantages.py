"""Advantages from rewards."""

from __future__ import annotations

import torch
from torch import Tensor


def group_advantages(rewards: Tensor, groups: Tensor, *, epsilon: float = 1e-6) -> Tensor:
    """``A_i = (R_i − mean_group R) / (std_group R + ε)``: the advantage of GRPO and DAPO (arXiv 2402.03300).

    Args:
        rewards: ``[B]``, one per response.
        groups: ``[B]`` int64, which prompt a response answers, as indices 0..G-1 in any order.
        epsilon: keeps a group without variance at exactly 0 rather than 0/0.

    Returns:
        ``[B]`` in the rewards' dtype (the default one for integer rewards). The standard deviation has
        Bessel's correction (n − 1), as in verl and TRL. A group whose rewards are all equal gets exactly 0; so does a
        group of one.

    >>> group_advantages(torch.tensor([1.0, -1.0, 1.0, 1.0]), torch.tensor([0, 0, 1, 1]))
    tensor([ 0.7071, -0.7071,  0.0000,  0.0000])
    """
    size = int(groups.max()) + 1 if groups.numel() else 0
    # float64 inside: equal rewards such as 0.1 must centre to 0, not to a rounding error divided by epsilon.
    values = rewards.double()
    count = torch.zeros(size, dtype=values.dtype, device=values.device).index_add_(0, groups, torch.ones_like(values))
    total = torch.zeros_like(count).index_add_(0, groups, values)
    centred = values - (total / count)[groups]
    variance = torch.zeros_like(count).index_add_(0, groups, centred**2) / (count - 1).clamp(min=1)
    constant = _is_constant(values, groups, size)
    advantages = centred / (variance.sqrt()[groups] + epsilon)
    dtype = rewards.dtype if rewards.is_floating_point() else torch.get_default_dtype()
    return torch.where(constant[groups], 0.0, advantages).to(dtype)


def _is_constant(values: Tensor, groups: Tensor, size: int) -> Tensor:
    """``[G]`` bool: are all values of a group equal?"""
    low = torch.full((size,), torch.inf, dtype=values.dtype, device=values.device)
    high = -low
    low = low.scatter_reduce(0, groups, values, "amin")
    high = high.scatter_reduce(0, groups, values, "amax")
    return low == high
