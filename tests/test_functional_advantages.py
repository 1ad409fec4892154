"""Advantages against numbers worked out by hand, or against textbook loops in float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import gradcheck
from torch.utils._python_dispatch import TorchDispatchMode

from helpers.tensors import doubles, f64, prefix_mask
from ibro_lightning.functional import (
    dr_grpo_advantages,
    gae,
    group_advantages,
    length_adaptive_lambda,
    masked_whiten,
    reinforce_plus_plus_advantages,
    reward_to_go,
    rloo_advantages,
)

torch.set_num_threads(1)
quick = settings(max_examples=50, deadline=None)
NAN = math.nan


def poisoned(values: Tensor, mask: Tensor, bad: float = NAN) -> Tensor:
    return torch.where(mask, values, bad)


def textbook_gae(
    rewards: Tensor, values: Tensor, lengths: list[int], gamma: float, lam: list[float], last_values: list[float]
) -> np.ndarray:
    """The backward loop of every textbook, one row at a time."""
    advantages = np.zeros(rewards.shape)
    for row, length in enumerate(lengths):
        advantage, next_value = 0.0, last_values[row]
        for t in reversed(range(length)):
            value = values[row, t].item()
            delta = rewards[row, t].item() + gamma * next_value - value
            advantage = delta + gamma * lam[row] * advantage
            advantages[row, t] = advantage
            next_value = value
    return advantages


# GAE.


def test_gae_by_hand() -> None:
    """γ = 0.9, λ = 0.5: δ = (0.9·0.6 − 0.5, 0.9·0.7 − 0.6, 1 − 0.7), and each A is δ plus 0.45 times the next A."""
    rewards, values = f64([0, 0, 1, NAN]), f64([0.5, 0.6, 0.7, NAN])
    result = gae(rewards, values, torch.tensor([[1, 1, 1, 0]]), gamma=0.9, lam=0.5)
    torch.testing.assert_close(result.advantages, f64([0.11425, 0.165, 0.3, 0]), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(result.returns, f64([0.61425, 0.765, 1.0, 0]), rtol=1e-12, atol=1e-12)


def test_by_default_a_verifiable_reward_reaches_every_token_undiscounted() -> None:
    rewards, values = torch.tensor([[0.0, 0, 1], [0, -1, 0]]), torch.tensor([[0.25, 0.5, 0.75], [0.5, 0.5, 9]])
    result = gae(rewards, values, torch.tensor([[1, 1, 1], [1, 1, 0]]))
    assert result.advantages.tolist() == [[0.75, 0.5, 0.25], [-1.5, -1.5, 0]]
    assert result.returns.tolist() == [[1, 1, 1], [-1, -1, 0]]


def test_last_values_stand_after_the_last_valid_token_of_each_row() -> None:
    """A full row, a shorter one and one without tokens; λ = 0 leaves δ = r + V' − V."""
    values = f64([1, 2], [3, NAN], [NAN, NAN])
    result = gae(torch.zeros(3, 2), values, prefix_mask([2, 1, 0], 2), lam=0.0, last_values=f64(10, 20, 30))
    assert result.advantages.tolist() == [[1, 8], [17, 0], [0, 0]]
    assert result.returns.tolist() == [[2, 10], [20, 0], [0, 0]]
    discounted = gae(torch.zeros(3, 2), values, prefix_mask([2, 1, 0], 2), gamma=0.5, last_values=f64(10, 20, 30))
    assert discounted.returns.tolist() == [[2.5, 5], [10, 0], [0, 0]]


def test_the_critic_may_have_a_lambda_of_its_own() -> None:
    rewards, values, mask = f64([0, 0, 1]), f64([0.5, 0.6, 0.7]), torch.ones(1, 3)
    mixed = gae(rewards, values, mask, gamma=0.9, lam=0.5, critic_lam=1.0)
    assert torch.equal(mixed.advantages, gae(rewards, values, mask, gamma=0.9, lam=0.5).advantages)
    torch.testing.assert_close(mixed.returns, f64([0.81, 0.9, 1.0]))  # Monte Carlo: the critic's values drop out
    assert torch.equal(mixed.returns, gae(rewards, values, mask, gamma=0.9, lam=1.0).returns)


def test_each_row_may_have_lambdas_of_its_own() -> None:
    rewards, values, mask = doubles(3, 5), doubles(3, 5, seed=1), prefix_mask([5, 3, 4], 5)
    lam, critic_lam = [0.0, 0.5, 1.0], [1.0, 0.25, 0.0]
    result = gae(rewards, values, mask, gamma=0.9, lam=torch.tensor(lam), critic_lam=torch.tensor(critic_lam))
    for row in range(3):
        one = slice(row, row + 1)
        alone = gae(rewards[one], values[one], mask[one], gamma=0.9, lam=lam[row], critic_lam=critic_lam[row])
        torch.testing.assert_close(result.advantages[one], alone.advantages)
        torch.testing.assert_close(result.returns[one], alone.returns)


@quick
@given(st.data(), st.floats(0, 1.01), st.integers(1, 11))
def test_gae_equals_the_textbook_loop(data: st.DataObject, gamma: float, columns: int) -> None:
    """For each length from 0 on, λ per row, and a value after the end; nan on padding must not show."""
    rows = data.draw(st.integers(1, 4))
    number = st.floats(0, 1)
    lengths = data.draw(st.lists(st.integers(0, columns), min_size=rows, max_size=rows))
    lam, critic_lam, last = (data.draw(st.lists(number, min_size=rows, max_size=rows)) for _ in range(3))
    rewards, values, mask = doubles(rows, columns), doubles(rows, columns, seed=1), prefix_mask(lengths, columns)
    result = gae(
        poisoned(rewards, mask),
        poisoned(values, mask),
        mask,
        gamma=gamma,
        lam=f64(*lam),
        critic_lam=f64(*critic_lam),
        last_values=f64(*last),
    )
    expected = textbook_gae(rewards, values, lengths, gamma, lam, last)
    of_critic = textbook_gae(rewards, values, lengths, gamma, critic_lam, last)
    np.testing.assert_allclose(result.advantages.numpy(), expected, rtol=1e-11, atol=1e-12)
    returns = of_critic + np.where(mask, values.numpy(), 0.0)
    np.testing.assert_allclose(result.returns.numpy(), returns, rtol=1e-11, atol=1e-12)


@quick
@given(st.lists(st.integers(0, 9), min_size=1, max_size=5), st.data())
def test_gae_without_discounts_is_reward_to_go_minus_value(lengths: list[int], data: st.DataObject) -> None:
    rows = len(lengths)
    rewards, values, mask = doubles(rows, 9), doubles(rows, 9, seed=1), prefix_mask(lengths, 9)
    result = gae(rewards, values, mask)
    togo = reward_to_go(rewards, mask)
    torch.testing.assert_close(result.advantages, torch.where(mask, togo - values, 0.0), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(result.returns, togo, rtol=1e-12, atol=1e-12)
    order = torch.tensor(data.draw(st.permutations(range(rows))))
    permuted = gae(rewards[order], values[order], mask[order])
    assert torch.equal(permuted.advantages, result.advantages[order])
    wider = [torch.nn.functional.pad(x, (0, 3), value=NAN) for x in (rewards, values)]
    padded = gae(*wider, torch.nn.functional.pad(mask.int(), (0, 3)))
    torch.testing.assert_close(padded.advantages[:, :9], result.advantages, rtol=1e-12, atol=1e-12)
    assert (padded.advantages[:, 9:] == 0).all()


@pytest.mark.parametrize("shape", [(1, 1), (2, 0), (0, 3)])
def test_gae_of_the_smallest_batches(shape: tuple[int, int]) -> None:
    result = gae(torch.full(shape, 2.0), torch.full(shape, 0.5), torch.ones(shape), lam=torch.ones(shape[0]))
    assert torch.equal(result.advantages, torch.full(shape, 1.5))
    assert torch.equal(result.returns, torch.full(shape, 2.0))


def test_gae_passes_gradcheck() -> None:
    mask = prefix_mask([5, 3, 0], 5)
    inputs = (doubles(3, 5, grad=True), doubles(3, 5, seed=1, grad=True), doubles(3, seed=2, grad=True))
    lam, critic_lam = torch.tensor([0.9, 0.5, 1.0]), 0.7

    def outputs(rewards: Tensor, values: Tensor, last_values: Tensor) -> tuple[Tensor, ...]:
        return gae(rewards, values, mask, gamma=0.9, lam=lam, critic_lam=critic_lam, last_values=last_values)

    assert gradcheck(outputs, inputs)


def test_padding_has_no_gradient_even_where_it_is_nan() -> None:
    mask = prefix_mask([3, 1, 0], 4)
    inputs = [poisoned(doubles(3, 4, seed=seed), mask).requires_grad_() for seed in (0, 1)]
    result = gae(*inputs, mask, gamma=0.9, lam=0.8)
    for grad in torch.autograd.grad((result.advantages**2 + result.returns).sum(), inputs):
        assert grad.isfinite().all()
        assert (grad[~mask] == 0).all()
        assert (grad[mask] != 0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int64])
def test_gae_is_computed_in_at_least_float32(dtype: torch.dtype) -> None:
    """300 tokens with a reward of 1 each: bfloat16 has no 257."""
    ones = torch.ones(1, 300, dtype=dtype)
    result = gae(ones, torch.zeros(1, 300, dtype=dtype), ones)
    assert result.advantages.dtype == torch.float32
    assert result.advantages[0].tolist() == list(range(300, 0, -1))


def test_a_long_response_stays_accurate_in_float32() -> None:
    rewards, values = doubles(1, 4000), doubles(1, 4000, seed=1)
    expected = textbook_gae(rewards, values, [4000], 1.0, [0.999], [0.0])
    result = gae(rewards.float(), values.float(), torch.ones(1, 4000), lam=0.999)
    np.testing.assert_allclose(result.advantages.numpy(), expected, rtol=0, atol=1e-6 * np.abs(expected).max())


class CountOps(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


def test_the_work_grows_with_the_logarithm_of_the_length() -> None:
    """A loop over tokens would start 64 times as many kernels for 64 times the length; here 6 more passes."""

    def ops(columns: int) -> int:
        ones = torch.ones(2, columns)
        with CountOps() as counter:
            gae(ones, ones, ones, lam=0.9)
        return counter.count

    assert ops(4096) - ops(2048) == ops(128) - ops(64) < 12


# Reward to go.


def test_reward_to_go_by_hand() -> None:
    rewards, mask = f64([1, 2, 4, NAN], [NAN, NAN, NAN, NAN]), prefix_mask([3, 0], 4)
    torch.testing.assert_close(reward_to_go(rewards, mask), f64([7, 6, 4, 0], [0, 0, 0, 0]))
    torch.testing.assert_close(reward_to_go(rewards, mask, gamma=0.5), f64([3, 4, 4, 0], [0, 0, 0, 0]))


@pytest.mark.parametrize("columns", [1, 2, 3, 4, 5, 8, 9, 16, 17])
def test_reward_to_go_of_every_length_around_powers_of_two(columns: int) -> None:
    rewards = doubles(2, columns)
    expected = [[sum(0.9 ** (u - t) * row[u] for u in range(t, columns)) for t in range(columns)] for row in rewards]
    togo = reward_to_go(rewards, torch.ones(2, columns), gamma=0.9)
    torch.testing.assert_close(togo, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=1e-12)


def test_reward_to_go_passes_gradcheck() -> None:
    mask = prefix_mask([4, 2], 4)
    assert gradcheck(lambda x: reward_to_go(x, mask, gamma=0.8), doubles(2, 4, grad=True))


# λ by length.


def test_length_adaptive_lambda_by_hand() -> None:
    """α·l = 0.5, 1, 2, 4, 50."""
    lam = length_adaptive_lambda(torch.tensor([10, 20, 40, 80, 1000]))
    torch.testing.assert_close(lam, torch.tensor([0.0, 0.0, 0.5, 0.75, 0.98]))
    torch.testing.assert_close(length_adaptive_lambda(f64(10, 40), alpha=1.0), f64(0.9, 0.975))


def test_length_adaptive_lambda_of_an_empty_response_is_zero() -> None:
    assert length_adaptive_lambda(torch.tensor([0])).tolist() == [0.0]


@pytest.mark.parametrize("alpha", [0.0, -1.0, NAN])
def test_length_adaptive_lambda_needs_a_positive_alpha(alpha: float) -> None:
    with pytest.raises(ValueError, match="alpha must be larger than 0"):
        length_adaptive_lambda(torch.tensor([5]), alpha=alpha)


# Advantages per group.

per_group = pytest.mark.parametrize("function", [dr_grpo_advantages, rloo_advantages])


def test_dr_grpo_and_rloo_by_hand_for_unsorted_groups() -> None:
    """Group 0 holds 3, 1, 2 (mean 2; means of the others 1.5, 2.5, 2); group 1 holds −1, 1; group 2 only 7."""
    rewards, groups = f64(3, -1, 1, 1, 2, 7), torch.tensor([0, 1, 0, 1, 0, 2])
    torch.testing.assert_close(dr_grpo_advantages(rewards, groups), f64(1, -1, -1, 1, 0, 0))
    torch.testing.assert_close(rloo_advantages(rewards, groups), f64(1.5, -2, -1.5, 2, 0, 0))


@per_group
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("reward", [0.1, -0.3, 1e8 + 0.1])
@pytest.mark.parametrize("size", [1, 2, 3, 7, 16])
def test_equal_rewards_give_exactly_zero(
    function: Callable[[Tensor, Tensor], Tensor], reward: float, size: int, dtype: torch.dtype
) -> None:
    advantages = function(torch.full((size,), reward, dtype=dtype), torch.zeros(size, dtype=torch.long))
    assert advantages.dtype == dtype
    assert advantages.tolist() == [0.0] * size


@per_group
def test_integer_rewards_and_no_rewards(function: Callable[[Tensor, Tensor], Tensor]) -> None:
    assert function(torch.zeros(0), torch.zeros(0, dtype=torch.long)).shape == (0,)
    advantages = function(torch.tensor([1, 0]), torch.tensor([0, 0]))
    assert advantages.dtype == torch.float32
    assert advantages[0] == -advantages[1] != 0


@per_group
def test_a_large_common_reward_does_not_blur_small_differences(function: Callable[[Tensor, Tensor], Tensor]) -> None:
    steps = torch.arange(11, dtype=torch.float64)
    advantages = function((10_000 + steps / 1024).float(), torch.zeros(11, dtype=torch.long))
    scale = 1.1 if function is rloo_advantages else 1.0
    torch.testing.assert_close(advantages.double(), scale * (steps - 5) / 1024, rtol=1e-6, atol=1e-9)


@per_group
def test_group_advantages_pass_gradcheck(function: Callable[[Tensor, Tensor], Tensor]) -> None:
    groups = torch.tensor([0, 1, 0, 2, 1, 0])
    assert gradcheck(lambda x: function(x, groups), doubles(6, grad=True))


@quick
@given(st.data())
def test_baselines_leave_out_what_they_say_and_follow_a_permutation(data: st.DataObject) -> None:
    size = data.draw(st.integers(1, 12))
    rewards = f64(*data.draw(st.lists(st.sampled_from([-1.0, -0.4, 0.1, 1.0]), min_size=size, max_size=size)))
    groups = torch.tensor([0, *data.draw(st.lists(st.integers(0, 2), min_size=size - 1, max_size=size - 1))])
    order = torch.tensor(data.draw(st.permutations(range(size))))
    dr_grpo, rloo = dr_grpo_advantages(rewards, groups), rloo_advantages(rewards, groups)
    for i in range(size):
        same = [rewards[j].item() for j in range(size) if groups[j] == groups[i]]
        others = [rewards[j].item() for j in range(size) if groups[j] == groups[i] and j != i]
        reward, n = rewards[i].item(), len(same)
        assert dr_grpo[i].item() == pytest.approx(reward - math.fsum(same) / n, abs=1e-12)
        assert rloo[i].item() == pytest.approx(reward - math.fsum(others) / (n - 1) if others else 0.0, abs=1e-12)
        assert rloo[i].item() == pytest.approx(n / max(n - 1, 1) * dr_grpo[i].item(), abs=1e-12)
        spread = np.std(same, ddof=1) if len(set(same)) > 1 else 0.0
        grpo = group_advantages(rewards, groups)[i].item()
        assert grpo * (spread + 1e-6) == pytest.approx(dr_grpo[i].item(), abs=1e-12)
    for function, result in ((dr_grpo_advantages, dr_grpo), (rloo_advantages, rloo)):
        torch.testing.assert_close(function(rewards[order], groups[order]), result[order], rtol=1e-12, atol=1e-12)


# REINFORCE++.


def test_reinforce_plus_plus_by_hand() -> None:
    """Rewards to go 3, 2 and 1 over three valid tokens: mean 2, variance 2/3."""
    rewards, mask = f64([1, 2, NAN], [1, NAN, NAN]), prefix_mask([2, 1], 3)
    advantages = reinforce_plus_plus_advantages(rewards, mask)
    root = 1 / math.sqrt(2 / 3 + 1e-8)
    torch.testing.assert_close(advantages, f64([root, 0, 0], [-root, 0, 0]), rtol=1e-12, atol=1e-12)


def test_reinforce_plus_plus_discounts() -> None:
    """γ = 0.5: rewards to go 2, 2 and 1 minus the given mean 1, over the given deviation 2."""
    rewards, mask = f64([1, 2, NAN], [1, NAN, NAN]), prefix_mask([2, 1], 3)
    whiten = partial(masked_whiten, mean=1.0, variance=torch.tensor(4.0))
    advantages = reinforce_plus_plus_advantages(rewards, mask, gamma=0.5, whiten=whiten)
    torch.testing.assert_close(advantages, f64([0.5, 0.5, 0], [0, 0, 0]), rtol=1e-8, atol=1e-8)


def test_ranks_that_share_mean_and_variance_get_the_advantages_of_the_whole_batch() -> None:
    rewards, mask = doubles(4, 5), prefix_mask([5, 2, 0, 4], 5)
    whole = reinforce_plus_plus_advantages(rewards, mask)
    togo = reward_to_go(rewards, mask)[mask]
    statistics = {"mean": togo.mean(), "variance": togo.var(correction=0)}
    whiten = partial(masked_whiten, **statistics)
    parts = [reinforce_plus_plus_advantages(rewards[i : i + 2], mask[i : i + 2], whiten=whiten) for i in (0, 2)]
    torch.testing.assert_close(torch.cat(parts), whole, rtol=1e-12, atol=1e-12)
    assert (whole[~mask] == 0).all()
    np.testing.assert_allclose([whole[mask].mean(), whole[mask].var(correction=0)], [0, 1], atol=1e-7)


def test_reinforce_plus_plus_passes_gradcheck() -> None:
    mask = prefix_mask([3, 2], 3)
    assert gradcheck(lambda x: reinforce_plus_plus_advantages(x, mask, gamma=0.9), doubles(2, 3, grad=True))


# Groups whose outcomes do not differ: shaping is not blown up by its own deviation.

WRONG = [-1.0] * 7 + [-1.001]


def one_group(rewards: list[float], outcomes: list[float], span: float) -> list[float]:
    groups = torch.zeros(len(rewards), dtype=torch.long)
    values = torch.tensor(rewards, dtype=torch.float64)
    return group_advantages(values, groups, outcomes=torch.tensor(outcomes), outcome_span=span).tolist()


def test_a_small_penalty_in_a_group_that_is_all_wrong_stays_small() -> None:
    """By hand: mean −1.000125, deviation max(0.00035, 2/2) = 1."""
    published = group_advantages(torch.tensor(WRONG, dtype=torch.float64), torch.zeros(8, dtype=torch.long)).tolist()
    assert published == pytest.approx([0.3526] * 7 + [-2.4679], abs=1e-3), "what the formula alone makes of it"
    found = one_group(WRONG, [0.0] * 8, 2.0)
    assert found == pytest.approx([0.000125] * 7 + [-0.000875], rel=1e-5)
    right = [reward + 2 for reward in WRONG]
    assert one_group(right, [1.0] * 8, 2.0) == pytest.approx(found, rel=1e-9)
    halves = [reward / 2 for reward in WRONG]
    assert one_group(halves, [0.0] * 8, 1.0) == pytest.approx(found, rel=1e-5), "0/1 rewards and half the penalty"


def test_shaping_larger_than_the_outcomes_span_is_divided_by_its_own_deviation() -> None:
    rewards = [-1.0, -4.0, -1.0, -4.0]
    published = group_advantages(torch.tensor(rewards, dtype=torch.float64), torch.zeros(4, dtype=torch.long)).tolist()
    assert one_group(rewards, [0.0] * 4, 2.0) == published


def test_each_group_is_looked_at_on_its_own() -> None:
    """One that differs, one that does not, one whose verifications were all stopped, one with a span of 0."""
    rewards = torch.tensor([1.0, -1.5, -1.0, -1.2, 0.0, 0.1, 0.0, 0.1], dtype=torch.float64)
    groups = torch.tensor([0, 0, 1, 1, 2, 2, 3, 3])
    outcomes = torch.tensor([1.0, 0.0, 0.0, 0.0, math.nan, math.nan, 1.0, 1.0])
    span = torch.tensor([2.0, 2.0, 2.0, 2.0, 1.0, 1.0, 0.0, 0.0])
    half = 1 / math.sqrt(2)
    found = group_advantages(rewards, groups, outcomes=outcomes, outcome_span=span, epsilon=0.0)
    assert found.tolist() == pytest.approx([half, -half, 0.1, -0.1, -0.1, 0.1, -half, half], rel=1e-9)


def test_a_stopped_verification_makes_no_difference_and_fractions_do() -> None:
    rewards = [-1.0, -1.0, -0.8]
    assert max(map(abs, one_group(rewards, [0.0, 0.0, math.nan], 2.0))) == pytest.approx(0.4 / 3, rel=1e-5)
    published = group_advantages(torch.tensor(rewards, dtype=torch.float64), torch.zeros(3, dtype=torch.long)).tolist()
    assert one_group(rewards, [0.0, 0.0, 0.1], 2.0) == published


@quick
@given(
    rows=st.lists(st.tuples(st.integers(0, 2), st.sampled_from([0.0, 0.5, 1.0]), st.floats(-3, 3)), min_size=1),
    scale=st.floats(0.01, 100),
    shift=st.floats(-5, 5),
)
def test_advantages_of_shaped_rewards(rows: list[tuple[int, float, float]], scale: float, shift: float) -> None:
    """They are the published ones where outcomes differ, never larger, sum to 0, and know no unit of reward."""
    numbers = {group: number for number, group in enumerate(dict.fromkeys(group for group, _, _ in rows))}
    groups = torch.tensor([numbers[group] for group, _, _ in rows])
    outcomes = torch.tensor([outcome for _, outcome, _ in rows], dtype=torch.float64)
    rewards = 2 * outcomes - 1 + torch.tensor([shaping for _, _, shaping in rows], dtype=torch.float64)
    of = partial(group_advantages, groups=groups, epsilon=1e-12)
    found, published = of(rewards, outcomes=outcomes, outcome_span=2.0), of(rewards)
    differ = torch.tensor([outcomes[groups == group].unique().numel() > 1 for group in groups])
    centred = rewards - torch.stack([rewards[groups == group].mean() for group in groups])
    assert torch.equal(found[differ], published[differ])
    assert (found.abs() <= published.abs() + 1e-12).all()
    assert (found.abs()[~differ] <= centred.abs()[~differ] + 1e-12).all()
    other = of(scale * rewards + shift, outcomes=outcomes, outcome_span=2.0 * scale)
    assert other.tolist() == pytest.approx(found.tolist(), rel=1e-4, abs=1e-7)


def test_a_batch_whose_outcomes_do_not_differ_is_whitened_by_no_less_than_their_span() -> None:
    """REINFORCE++: variance (0.001² · 3/16) of four rewards counts as (2/2)²."""
    rewards, mask = torch.tensor([[-1.0], [-1.0], [-1.0], [-1.001]], dtype=torch.float64), torch.ones(4, 1)
    whiten = partial(masked_whiten, least_variance=1.0)
    found = reinforce_plus_plus_advantages(rewards, mask, whiten=whiten).squeeze(1).tolist()
    assert found == pytest.approx([0.00025] * 3 + [-0.00075], rel=1e-6)
    published = reinforce_plus_plus_advantages(rewards, mask).squeeze(1).tolist()
    assert published == pytest.approx([1 / math.sqrt(3)] * 3 + [-math.sqrt(3)], abs=0.05)
