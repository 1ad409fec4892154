"""The term that information-bottleneck regularisation adds to a policy loss (arXiv 2507.18391)."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from ibro_lightning.functional.aggregate import masked_mean

Part = Literal["raw", "centred", "uniform", "reversed"]


def part_of(weight: Tensor, mean: Tensor | float, part: Part) -> Tensor:
    """What multiplies the entropy: A, and Ā of the whole optimizer step, give A, A − Ā, Ā, or A − 2Ā."""
    if part == "uniform":
        return mean * torch.ones_like(weight)
    return weight - {"raw": 0.0, "centred": 1.0, "reversed": 2.0}[part] * mean


def information_bottleneck_objective(
    entropy: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    part: Part = "raw",
    mean_advantage: Tensor | float | None = None,
) -> Tensor:
    """``[B, T]`` ``sg(A_t)·H_t`` in nats, to be maximised: entropy is kept where it led to success, removed elsewhere.

    The loss of an optimizer step with ``N`` valid tokens, α = 0.005 in the paper::

        loss = policy_loss - 0.005 * token_mean(information_bottleneck_objective(entropy, advantages, mask), mask, N)

    Training computes the same in :class:`ibro_lightning.regularizers.InformationBottleneck`, written out; this is for
    loops of your own. ``mean(A·H) = Ā·H̄ + Cov(A, H)`` over tokens: the first summand is a uniform bonus or penalty.

    Args:
        entropy: ``[B, T]`` of the current policy, in nats, with gradients.
        advantages: ``[B, T]``; gradients do not pass through them.
        mask: ``[B, T]`` valid tokens; the result is meaningless elsewhere.
        part: ``raw`` is A·H; ``centred`` is (A − Ā)·H, the covariance alone; ``uniform`` is Ā·H; ``reversed`` is
            (A − 2Ā)·H, the covariance with the uniform part's sign reversed.
        mean_advantage: Ā over the whole optimizer step, if it has several micro-batches or ranks; None takes the mean
            over ``mask``.
    """
    advantages = advantages.detach()
    if part == "raw":
        return advantages * entropy
    mean = masked_mean(advantages, mask) if mean_advantage is None else mean_advantage
    return part_of(advantages, mean, part) * entropy
