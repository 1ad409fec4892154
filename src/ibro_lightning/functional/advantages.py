"""Advantages from rewards."""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce
from typing import NamedTuple

import torch
from torch import Tensor

from ibro_lightning.functional.aggregate import masked_whiten
from ibro_lightning.functional.shaping import informative_groups


class GAE(NamedTuple):
    """Result of :func:`gae`; both fields ``[B, T]``, exactly 0 on padding."""

    advantages: Tensor
    """Of each token, before whitening."""
    returns: Tensor
    """The critic's regression target: advantages (with the critic's λ) + values."""


def group_advantages(
    rewards: Tensor,
    groups: Tensor,
    *,
    epsilon: float = 1e-6,
    outcomes: Tensor | None = None,
    outcome_span: Tensor | float = 1.0,
) -> Tensor:
    """``A_i = (R_i − mean_group R) / (std_group R + ε)``: the advantage of GRPO and DAPO (arXiv 2402.03300).

    In a group that is all wrong (or all right), rewards differ only by their shaping, such as a length penalty, and the
    formula would scale these differences up to the size of right and wrong, however small they are. Given ``outcomes``,
    the deviation of such a group counts as at least ``outcome_span / 2``, that of a group that is half right: a penalty
    of 0.001 then makes an advantage of about 0.001. The formula holds for groups whose outcomes differ.

    Args:
        rewards: ``[B]``, one per response.
        groups: ``[B]`` int64, the prompt that a response answers, as indices 0..G-1 in any order.
        epsilon: keeps a group without variance at exactly 0 rather than 0/0.
        outcomes: ``[B]``, such as the accuracy in [0, 1]; nan if unknown. None: the rewards are the outcomes.
        outcome_span: the reward of the best outcome less that of the worst, ≥ 0: 2 for rewards of ±1. One number, or
            ``[B]``, of which a group takes its largest.

    Returns:
        ``[B]`` in the rewards' dtype (the default one for integer rewards). The standard deviation has Bessel's
        correction (n − 1), as in verl and TRL. A group whose rewards are all equal gets exactly 0; so does a group of
        one. Multiplying rewards and span by c > 0 changes nothing (except through ε); nor does adding a constant.

    >>> group_advantages(torch.tensor([1.0, -1.0, 1.0, 1.0]), torch.tensor([0, 0, 1, 1]))
    tensor([ 0.7071, -0.7071,  0.0000,  0.0000])
    >>> wrong = torch.tensor([-1.0, -1.0, -1.0, -1.1])
    >>> group_advantages(wrong, torch.zeros(4, dtype=torch.long), outcomes=torch.zeros(4), outcome_span=2.0)
    tensor([ 0.0250,  0.0250,  0.0250, -0.0750])
    """
    centred, _ = centre_groups(rewards, groups)
    deviation, _ = group_deviations(rewards, groups, outcomes, outcome_span)
    return (centred / (deviation[groups] + epsilon)).to(float_dtype(rewards))


def group_deviations(
    rewards: Tensor, groups: Tensor, outcomes: Tensor | None, outcome_span: Tensor | float
) -> tuple[Tensor, Tensor]:
    """What :func:`group_advantages` divides by, but for its ε, and the groups' sizes; ``[G]`` float64 each."""
    centred, count = centre_groups(rewards, groups)
    variance = torch.zeros_like(count).index_add_(0, groups, centred**2) / (count - 1).clamp(min=1)  # [G]
    deviation = variance.sqrt()
    if outcomes is not None:
        deviation = torch.maximum(deviation, least_deviation(outcomes, outcome_span, groups, len(count)))
    return deviation, count


def least_deviation(outcomes: Tensor, span: Tensor | float, groups: Tensor, size: int) -> Tensor:
    """``[G]`` float64: half the span where a group's outcomes are all equal, otherwise 0."""
    has_outcome = ~outcomes.isnan()
    differ = informative_groups(outcomes[has_outcome], groups[has_outcome], size)  # [G]
    return torch.where(differ, 0.0, widest_spans(span, groups, size) / 2)


def widest_spans(span: Tensor | float, groups: Tensor, size: int) -> Tensor:
    """``[G]`` float64: the largest span of each group's responses, of one number or ``[B]``."""
    spans = torch.as_tensor(span, dtype=torch.float64, device=groups.device).expand(groups.shape)
    return torch.zeros(size, dtype=torch.float64, device=groups.device).scatter_reduce(0, groups, spans, "amax")


def dr_grpo_advantages(rewards: Tensor, groups: Tensor) -> Tensor:
    """``A_i = R_i − mean_group R``: the advantage of Dr. GRPO (arXiv 2503.20783), which has no standard deviation.
    Arguments, dtype and groups without variance as in :func:`group_advantages`.

    >>> dr_grpo_advantages(torch.tensor([1.0, 0.0, 1.0, 1.0]), torch.tensor([0, 0, 1, 1]))
    tensor([ 0.5000, -0.5000,  0.0000,  0.0000])
    """
    centred, _ = centre_groups(rewards, groups)
    return centred.to(float_dtype(rewards))


def rloo_advantages(rewards: Tensor, groups: Tensor) -> Tensor:
    """``A_i = R_i − mean of the others of its group``: REINFORCE leave-one-out (arXiv 2402.14740).

    Equal to ``n / (n − 1)`` times :func:`dr_grpo_advantages`; unlike it, the baseline does not depend on the response
    itself, so the policy gradient is unbiased. Arguments, dtype and groups without variance as in
    :func:`group_advantages`.

    >>> rloo_advantages(torch.tensor([1.0, 0.0, 0.0, 5.0]), torch.tensor([0, 0, 0, 1]))
    tensor([ 1.0000, -0.5000, -0.5000,  0.0000])
    """
    centred, count = centre_groups(rewards, groups)
    return (centred * (count / (count - 1).clamp(min=1))[groups]).to(float_dtype(rewards))


def reward_to_go(rewards: Tensor, mask: Tensor, *, gamma: float = 1.0) -> Tensor:
    """``R_t = Σ_l γ^l r_{t+l}``: the discounted rewards from each token on.

    Args:
        rewards: ``[B, T]`` per token. Those on padding are ignored, even nan, and 0 in the result.
        mask: ``[B, T]``, the response mask: 1 on a *prefix* of each row.
        gamma: discount per token.
    """
    mask = mask.bool()
    rewards = torch.where(mask, rewards.to(_working_dtype(rewards)), 0.0)
    return torch.where(mask, _discounted_suffix_sum(rewards, gamma), 0.0)


def gae(
    rewards: Tensor,
    values: Tensor,
    mask: Tensor,
    *,
    gamma: float = 1.0,
    lam: float | Tensor = 1.0,
    critic_lam: float | Tensor | None = None,
    last_values: Tensor | None = None,
) -> GAE:
    """``A_t = Σ_l (γλ)^l δ_{t+l}``, ``δ_t = r_t + γV_{t+1} − V_t``: generalised advantages (arXiv 1506.02438).

    Args:
        rewards: ``[B, T]`` per token; a verifiable reward is on the last response token.
        values: ``[B, T]``, the critic's value *before* each token. Rewards and values on padding are ignored, even
            nan.
        mask: ``[B, T]``, the response mask: 1 on a *prefix* of each row (a hole would end the response there).
        gamma: discount per token.
        lam: λ of the advantages, one number or ``[B]``, for example from :func:`length_adaptive_lambda`.
        critic_lam: λ of the returns, one number or ``[B]``; ``lam`` if None. 1 is VAPO's decoupled GAE
            (arXiv 2504.05118), whose critic learns from unbiased returns whatever λ the policy uses.
        last_values: ``[B]``, the value after each row's last valid token; 0 if None. Pass the critic's for responses
            cut off at the length limit, if that should not count as an end.

    Returns:
        Advantages and returns ``[B, T]`` in at least float32, exactly 0 on padding. ``returns = advantages(critic_lam)
        + values``, *before* any whitening.
    """
    mask = mask.bool()
    dtype = _working_dtype(rewards, values)
    # Masked before any arithmetic: nan on padding would otherwise spread leftwards over the row.
    rewards, values = (torch.where(mask, x.to(dtype), 0.0) for x in (rewards, values))
    bootstrap = values.new_zeros(len(values)) if last_values is None else last_values.to(dtype)  # [B]
    next_values = torch.where(_shift_left(mask, 1), _shift_left(values, 1), bootstrap.unsqueeze(1))
    delta = torch.where(mask, rewards + gamma * next_values - values, 0.0)  # [B, T]

    def advantages_with(lam: float | Tensor) -> Tensor:
        return torch.where(mask, _discounted_suffix_sum(delta, gamma * lam), 0.0)

    advantages = advantages_with(lam)
    critic_advantages = advantages if critic_lam is None else advantages_with(critic_lam)
    return GAE(advantages, critic_advantages + values)


def length_adaptive_lambda(lengths: Tensor, *, alpha: float = 0.05) -> Tensor:
    """``λ = 1 − 1/(α·l)``, between 0 and 1: VAPO's λ for a response of ``l`` tokens (arXiv 2504.05118).

    It makes ``Σ_t λ^t ≈ 1/(1 − λ) = α·l``: the horizon of an advantage grows with the response.

    Args:
        lengths: ``[B]`` response lengths in tokens.
        alpha: larger than 0. Responses of up to ``1/α`` tokens get λ = 0.

    Returns:
        ``[B]`` in the default dtype (the lengths' own if they are floating).

    >>> length_adaptive_lambda(torch.tensor([10, 40, 1000]))
    tensor([0.0000, 0.5000, 0.9800])
    """
    if not alpha > 0:
        raise ValueError(f"alpha must be larger than 0, got {alpha}")
    return (1.0 - 1.0 / (alpha * lengths.to(float_dtype(lengths)))).clamp(0.0, 1.0)


def reinforce_plus_plus_advantages(
    token_rewards: Tensor,
    mask: Tensor,
    *,
    gamma: float = 1.0,
    whiten: Callable[[Tensor, Tensor], Tensor] = masked_whiten,
) -> Tensor:
    """Reward-to-go whitened over the valid tokens of the whole batch: REINFORCE++ (arXiv 2501.03262).

    DAPO's ``advantage: reinforce++`` runs the same two functions on tokens without padding, some rows at a time; a test
    holds that it gives what this does.

    For the variant with a baseline, take rewards less their group's mean (:func:`dr_grpo_advantages`). In a batch that
    is all wrong (or all right), rewards differ only by their shaping: whiten with a ``least_variance`` of
    ``(outcome_span / 2)²`` then, for the reason given in :func:`group_advantages`.

    Args:
        token_rewards: ``[B, T]``: the response's reward on its last token; with a reference policy, less the
            coefficient times the k1 estimate of the KL on every token.
        mask: ``[B, T]``, the response mask: 1 on a *prefix* of each row.
        gamma: discount per token.
        whiten: ``(reward_to_go, mask) → [B, T]``; the default takes the valid tokens of this batch. Another one may
            whiten over several processes, with a least variance, or over a part of the tokens.

    Returns:
        ``[B, T]`` in at least float32, exactly 0 on padding.
    """
    return whiten(reward_to_go(token_rewards, mask, gamma=gamma), mask)


def _discounted_suffix_sum(x: Tensor, discount: float | Tensor) -> Tensor:
    """``y_t = Σ_l c^l x_{t+l}`` along dim 1 of ``[B, T]``, with ``c`` one number or ``[B]``.

    Takes log2(T) passes over the whole tensor, where a Python loop over 20,000 tokens would launch as many kernels.
    After a pass with shift s, every position holds the sum of its next 2s terms.
    """
    # In float64: squared ten times, the rounding of λ = 0.999 to float32 grows a thousandfold.
    factor = torch.as_tensor(discount, dtype=torch.float64, device=x.device).reshape(-1, 1)  # [B or 1, 1]
    shift = 1
    while shift < x.shape[1]:
        x = x + factor.to(x.dtype) * _shift_left(x, shift)
        factor = factor * factor
        shift *= 2
    return x


def _shift_left(x: Tensor, places: int) -> Tensor:
    """``[B, T]``: column t of the result is column t + places of ``x``, or 0 past its end."""
    kept = x[:, places:]
    return torch.cat([kept, x.new_zeros(len(x), x.shape[1] - kept.shape[1])], dim=1)


def _working_dtype(*tensors: Tensor) -> torch.dtype:
    """At least float32: sums over thousands of tokens fail in half precision."""
    return reduce(torch.promote_types, (tensor.dtype for tensor in tensors), torch.float32)


def float_dtype(x: Tensor) -> torch.dtype:
    return x.dtype if x.is_floating_point() else torch.get_default_dtype()


def centre_groups(rewards: Tensor, groups: Tensor) -> tuple[Tensor, Tensor]:
    """``R − mean_group R`` ``[B]``, exactly 0 in groups of equal rewards, and the groups' sizes ``[G]``; float64."""
    size = int(groups.max()) + 1 if groups.numel() else 0
    # In float64: equal rewards such as 0.1 must centre to 0, not to a rounding error divided by epsilon.
    values = rewards.double()
    count = torch.zeros(size, dtype=values.dtype, device=values.device).index_add_(0, groups, torch.ones_like(values))
    total = torch.zeros_like(count).index_add_(0, groups, values)  # [G]
    varies = informative_groups(values, groups, size) | total.isnan()  # [G]
    return torch.where(varies[groups], values - (total / count)[groups], 0.0), count
