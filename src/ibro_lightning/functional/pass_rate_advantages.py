"""Advantages that weigh a group by how hard its prompt is: another baseline than the mean, or powers of the pass rate.

Arguments that are not explained here are those of :func:`~ibro_lightning.functional.group_advantages`; a group whose
rewards are all equal gets exactly 0.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ibro_lightning.functional.advantages import centre_groups, float_dtype, group_deviations, widest_spans

LARGEST_POWER = 10.0
"""Of the odds of a pass rate: far above any paper's, and 7 wrong responses to a right one are still finite."""


def quantile_advantages(
    rewards: Tensor,
    groups: Tensor,
    *,
    quantile: float = 0.4,
    epsilon: float = 1e-6,
    outcomes: Tensor | None = None,
    outcome_span: Tensor | float = 1.0,
) -> Tensor:
    """``A_i = (R_i − Q_K R) / (std_group R + ε)``: the group's K-quantile as baseline (QAE, arXiv 2509.22611).

    Of rewards 0 and 1 at pass rate p, the baseline is 0 where p ≤ 1 − K, so that only right responses have an
    advantage, and otherwise 1, so that only wrong ones have. ``Q_K`` is the smallest reward that at least a share K of
    the group does not exceed, never a value between two.

    Args:
        quantile: K, above 0 and up to 1: 0.4 in the paper, 0.6 against a collapse of entropy.

    >>> quantile_advantages(torch.tensor([1.0, 0.0, 0.0, 0.0]), torch.zeros(4, dtype=torch.long))
    tensor([2.0000, 0.0000, 0.0000, 0.0000])
    """
    if not 0 < quantile <= 1:
        raise ValueError(f"quantile must be above 0 and at most 1, got {quantile}")
    deviation, count = group_deviations(rewards, groups, outcomes, outcome_span)  # [G]
    values, by_value = rewards.double().sort(stable=True)
    by_group = groups[by_value].sort(stable=True).indices  # group after group, each from its lowest reward on
    size = count.long()
    rank = (quantile * count - 1e-9).ceil().long().clamp(min=1)  # 1e-9: 0.1·30 is above 3 in floating point
    place = (size.cumsum(0) - size + rank - 1).clamp(max=max(len(values) - 1, 0))  # [G]; of an index without rewards
    baseline = values[by_group][place] if len(values) else count
    return ((rewards.double() - baseline[groups]) / (deviation[groups] + epsilon)).to(float_dtype(rewards))


def maxrl_advantages(
    rewards: Tensor, groups: Tensor, *, outcomes: Tensor | None = None, outcome_span: Tensor | float = 1.0
) -> Tensor:
    """``A_i = (R_i − p) / p`` for rewards 0 and 1 at pass rate p; 0 where p is 0 (MaxRL, arXiv 2602.02710).

    The gradient of log-likelihood of being right in place of that of its probability, to as many terms as there are
    responses: prompts that are rarely solved weigh 1/p. Rewards on another scale, or with shaping, are
    ``(R_i − mean_group R) / (span·p)``.

    Args:
        outcomes: from 0 (wrong) to 1 (right), nan where it is unknown: p is the mean of the others over the group.
            None: the rewards are the outcomes.

    Raises:
        ValueError: rewards of a group differ, and an outcome is not in [0, 1], such as a reward of −1 without outcomes:
            their mean is no pass rate.

    >>> maxrl_advantages(torch.tensor([1.0, 0.0, 0.0, 0.0]), torch.zeros(4, dtype=torch.long))
    tensor([ 3., -1., -1., -1.])
    """
    centred, rate = _centred_and_rate(rewards, groups, outcomes, outcome_span)
    return torch.where(rate > 0, centred / rate, 0.0 * centred).to(float_dtype(rewards))


def asym_grpo_advantages(
    rewards: Tensor,
    groups: Tensor,
    *,
    positive_power: float = 0.9,
    negative_power: float = 0.4,
    outcomes: Tensor | None = None,
    outcome_span: Tensor | float = 1.0,
) -> Tensor:
    """``((1−p)/p)^β⁺`` for right responses and ``−(p/(1−p))^β⁻`` for wrong ones, at pass rate p; 0 where p is 0 or 1
    (AsymGRPO, arXiv 2604.04894).

    Both powers ½ are GRPO with the population's standard deviation. A note by others was seen, not the paper, and it
    gives the formula up to a factor, which is 1 here. Rewards on another scale, or with shaping, enter by their
    distance from the group's mean, ``c = (R_i − mean_group R)/span``: ``c/(1−p)`` times the first factor where c > 0,
    ``c/p`` times the second elsewhere.

    Args:
        positive_power, negative_power: β⁺ and β⁻, from 0 to 10.
        outcomes: as in :func:`maxrl_advantages`, which also says which are refused.

    >>> asym_grpo_advantages(torch.tensor([1.0, 0.0]), torch.zeros(2, dtype=torch.long))
    tensor([ 1., -1.])
    """
    for name, power in (("positive_power", positive_power), ("negative_power", negative_power)):
        if not 0 <= power <= LARGEST_POWER:
            raise ValueError(f"{name} must be from 0 to {LARGEST_POWER:g}, got {power}")
    centred, rate = _centred_and_rate(rewards, groups, outcomes, outcome_span)
    inside = (rate > 0) & (rate < 1)
    p = torch.where(inside, rate, 0.5)
    right, wrong = ((1 - p) / p) ** positive_power / (1 - p), (p / (1 - p)) ** negative_power / p
    factor = torch.where(centred > 0, right, wrong)
    return torch.where(inside, centred * factor, 0.0 * centred).to(float_dtype(rewards))


def _centred_and_rate(
    rewards: Tensor, groups: Tensor, outcomes: Tensor | None, span: Tensor | float
) -> tuple[Tensor, Tensor]:
    """``(R − mean_group R)/span`` and the group's pass rate, ``[B]`` float64 each. A reward that is nan is nan in the
    former, and stays so times 0."""
    centred, count = centre_groups(rewards, groups)
    widest = widest_spans(span, groups, len(count))  # [G]
    results = (rewards if outcomes is None else outcomes).double()
    graded = ~results.isnan()
    differs = graded & (centred != 0)  # elsewhere the advantage is 0, whatever the outcomes are
    if bool((differs & ((results < 0) | (results > 1 + 1e-6))).any()):
        what = "outcomes" if outcomes is not None else "without outcomes, rewards"
        raise ValueError(f"{what} must be from 0 (wrong) to 1 (right): their mean is the pass rate")
    total = torch.zeros_like(count).index_add_(0, groups, torch.where(graded, results, 0.0))
    rate = total / torch.zeros_like(count).index_add_(0, groups, graded.double()).clamp(min=1)  # [G]
    return torch.where(widest[groups] > 0, centred / widest[groups], 0.0), rate[groups]
