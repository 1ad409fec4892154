"""The critic's loss, per token."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class ClippedValueLoss(NamedTuple):
    """Per-token result of :func:`clipped_value_loss`; both fields ``[B, T]``."""

    loss: Tensor
    """To be minimised; carries the gradient."""
    clipped: Tensor
    """bool: the clipped branch was the larger one, so the token has no gradient."""


def clipped_value_loss(
    values: Tensor, old_values: Tensor, returns: Tensor, *, clip: float | None = 0.5
) -> ClippedValueLoss:
    """``½·max((V − R)², (clip(V, V_old ± clip) − R)²)``: the value loss of PPO's reference code (arXiv 1707.06347).

    A value that has already moved by ``clip`` towards its return has no gradient; one that moved away from it keeps
    its full gradient.

    Args:
        values, old_values: ``[B, T]`` of the current critic (gradient flows here), and at the time of the rollout.
        returns: ``[B, T]``, the regression targets. Padding must hold finite numbers: a nan there does not reach the
            aggregate, but it does reach the gradient.
        clip: how far a value may move per rollout, in units of reward; None switches clipping off.
    """
    loss = (values - returns) ** 2
    clipped = torch.zeros_like(loss, dtype=torch.bool)
    if clip is not None:
        inside = old_values + (values - old_values).clamp(-clip, clip)
        loss_inside = (inside - returns) ** 2
        clipped = loss_inside > loss
        loss = torch.where(clipped, loss_inside, loss)
    return ClippedValueLoss(0.5 * loss, clipped)
