"""The importable maths against numbers worked out by hand, or against a second formula in float64."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import gradcheck

from ibro_lightning.functional import (
    approximate_kl,
    avg_at_k,
    bootstrap_interval,
    clipped_surrogate,
    group_advantages,
    informative_groups,
    logprob_and_entropy,
    masked_covariance,
    masked_mean,
    overlong_penalty,
    pass_at_k,
    token_mean,
)

torch.set_num_threads(1)
LN2, LN3 = math.log(2), math.log(3)
quick = settings(max_examples=50, deadline=None)


def doubles(*shape: int, seed: int = 0, grad: bool = False) -> Tensor:
    values = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return values.requires_grad_(grad)


def f64(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


# Log-probs and entropies.


def test_logprob_and_entropy_of_a_distribution_worked_out_by_hand() -> None:
    """π = (1/2, 1/4, 1/4) has H = 3/2 ln 2."""
    logp, entropy = logprob_and_entropy(f64(0.5, 0.25, 0.25).log().expand(3, 3), torch.tensor([0, 1, 2]))
    torch.testing.assert_close(logp, f64(-LN2, -2 * LN2, -2 * LN2))
    torch.testing.assert_close(entropy, f64(1.5 * LN2, 1.5 * LN2, 1.5 * LN2))


def test_equal_logits_have_the_entropy_of_the_uniform_distribution() -> None:
    logp, entropy = logprob_and_entropy(torch.full((2, 7), -3.0), torch.tensor([0, 6]))
    torch.testing.assert_close(logp, torch.full((2,), -math.log(7)))
    torch.testing.assert_close(entropy, torch.full((2,), math.log(7)))


def test_temperature_divides_the_logits_of_both_outputs() -> None:
    """Odds 4 : 1 at temperature 2 are odds 2 : 1, so π = (2/3, 1/3) and H = ln 3 − 2/3 ln 2."""
    logp, entropy = logprob_and_entropy(f64(0.8, 0.2).log().expand(2, 2), torch.tensor([0, 1]), temperature=2.0)
    torch.testing.assert_close(logp, f64(LN2 - LN3, -LN3))
    torch.testing.assert_close(entropy, f64(*[LN3 - 2 / 3 * LN2] * 2))


def test_without_entropy_only_the_logprob_is_returned() -> None:
    logits, targets = doubles(2, 3, 5), torch.tensor([[0, 1, 2], [3, 4, 0]])
    logp, entropy = logprob_and_entropy(logits, targets, with_entropy=False)
    assert entropy is None
    torch.testing.assert_close(logp, logprob_and_entropy(logits, targets)[0], rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits_are_normalised_in_float32(dtype: torch.dtype) -> None:
    """A log-softmax in bfloat16 is wrong in the third digit, which a probability ratio would show as noise."""
    logits = (10 * doubles(4, 50)).to(dtype)
    p = logits.double().softmax(-1)
    logp, entropy = logprob_and_entropy(logits, torch.tensor([0, 1, 2, 3]))
    assert logp.dtype == entropy.dtype == torch.float32
    torch.testing.assert_close(logp.double(), p[range(4), range(4)].log(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(entropy.double(), -(p * p.log()).sum(-1), rtol=1e-5, atol=1e-5)


def test_logprob_and_entropy_pass_gradcheck() -> None:
    targets = torch.tensor([[0, 4], [2, 2]])
    assert gradcheck(lambda x: logprob_and_entropy(x, targets, temperature=0.7), doubles(2, 2, 5, grad=True))


def test_gradients_with_respect_to_logits_are_the_textbook_ones() -> None:
    """∂log π(a)/∂x = 1[a] − p, and ∂H/∂x = −p (log p + H)."""
    logits, targets = doubles(3, 6, grad=True), torch.tensor([0, 5, 3])
    logp, entropy = logprob_and_entropy(logits, targets)
    p = logits.detach().numpy()
    p = np.exp(p) / np.exp(p).sum(-1, keepdims=True)
    h = -(p * np.log(p)).sum(-1, keepdims=True)
    (of_logp,) = torch.autograd.grad(logp.sum(), logits, retain_graph=True)
    (of_entropy,) = torch.autograd.grad(entropy.sum(), logits)
    np.testing.assert_allclose(of_logp.numpy(), np.eye(6)[targets] - p, rtol=1e-12, atol=1e-14)
    np.testing.assert_allclose(of_entropy.numpy(), -p * (np.log(p) + h), rtol=1e-12, atol=1e-14)


def test_a_masked_vocabulary_counts_as_absent_also_in_the_gradient() -> None:
    """Logits of −inf give 0·(−inf) = nan in the plain formula."""
    short = doubles(2, 3, grad=True)
    long = torch.cat([short.detach(), torch.full((2, 2), -torch.inf, dtype=torch.float64)], -1).requires_grad_()
    targets = torch.tensor([0, 2])
    expected, actual = logprob_and_entropy(short, targets), logprob_and_entropy(long, targets)
    for one, other in zip(expected, actual, strict=True):
        torch.testing.assert_close(other, one)
    (expected_grad,) = torch.autograd.grad(sum(x.sum() for x in expected), short)
    (actual_grad,) = torch.autograd.grad(sum(x.sum() for x in actual), long)
    torch.testing.assert_close(actual_grad[:, :3], expected_grad)
    assert (actual_grad[:, 3:] == 0).all()


@pytest.mark.parametrize(
    "row", [[1e4, 0.0, -1e4], [3e38, -3e38, 0.0], [-1e30, -1e30, -1e30], [0.0, -torch.inf, -torch.inf], [200.0, 0.0, 0]]
)
def test_extreme_logits_stay_finite_also_in_the_gradient(row: list[float]) -> None:
    logits = torch.tensor([row], requires_grad=True)
    logp, entropy = logprob_and_entropy(logits, torch.tensor([0]))
    (logp + entropy).sum().backward()
    assert logp.isfinite().all()
    assert entropy.isfinite().all()
    assert logits.grad.isfinite().all()
    equal = row[0] == row[1]
    torch.testing.assert_close(entropy.detach(), torch.tensor([LN3 if equal else 0.0]))


@quick
@given(st.lists(st.floats(-30, 30), min_size=1, max_size=9), st.floats(-1e3, 1e3), st.floats(0.2, 5))
def test_entropy_lies_between_0_and_log_v_and_ignores_a_shift(
    row: list[float], shift: float, temperature: float
) -> None:
    targets = torch.tensor(0)
    logp, entropy = logprob_and_entropy(f64(*row), targets, temperature=temperature)
    assert -1e-12 <= entropy <= math.log(len(row)) + 1e-12
    assert logp <= 0
    shifted = logprob_and_entropy(f64(*row) + shift, targets, temperature=temperature)
    torch.testing.assert_close(torch.stack(shifted), torch.stack((logp, entropy)), rtol=1e-8, atol=1e-9)


# The clipped surrogate.

# ratio, A, loss, (low, high, dual); ε_low = 0.2, ε_high = 0.28, c = 10
CASES = [
    (1.0, 2.0, -2.0, ()),
    (1.1, 2.0, -2.2, ()),
    (1.27, 1.0, -1.27, ()),  # inside the raised upper bound, outside the symmetric one
    (1.5, 1.0, -1.28, ("high",)),
    (20.0, 0.5, -0.64, ("high",)),
    (0.5, 1.0, -0.5, ()),  # the pessimistic side is not clipped
    (0.9, -1.0, 0.9, ()),
    (0.5, -1.0, 0.8, ("low",)),
    (0.5, -3.0, 2.4, ("low",)),
    (1.5, -1.0, 1.5, ()),
    (9.0, -1.0, 9.0, ()),
    (20.0, -1.0, 10.0, ("dual",)),
    (20.0, -3.0, 30.0, ("dual",)),
    (20.0, 0.0, 0.0, ()),
    (0.01, 0.0, 0.0, ()),
]


@pytest.mark.parametrize(("ratio", "advantage", "loss", "flags"), CASES)
def test_surrogate_loss_flags_and_gradient(ratio: float, advantage: float, loss: float, flags: tuple[str, ...]) -> None:
    """A flag says exactly where the gradient is gone; everywhere else it is −rA."""
    logp, old_logp = f64(-1.0 + math.log(ratio)).requires_grad_(), f64(-1.0)
    result = clipped_surrogate(logp, old_logp, f64(advantage))
    torch.testing.assert_close(result.loss, f64(loss))
    raised = {name for name in ("low", "high", "dual") if getattr(result, f"clipped_{name}").item()}
    assert raised == set(flags)
    (grad,) = torch.autograd.grad(result.loss.sum(), logp)
    torch.testing.assert_close(grad, f64(0.0 if flags else -ratio * advantage))


def test_clip_bounds_are_the_ones_asked_for() -> None:
    logp = f64(math.log(3), math.log(0.1), math.log(3))
    result = clipped_surrogate(
        logp, f64(0, 0, 0), f64(1, -1, -1), clip_ratio_low=0.5, clip_ratio_high=1.0, dual_clip=2.5
    )
    torch.testing.assert_close(result.loss, f64(-2.0, 0.5, 2.5))


def test_without_dual_clip_a_bad_token_costs_its_whole_ratio() -> None:
    result = clipped_surrogate(f64(math.log(20)), f64(0), f64(-1), dual_clip=None)
    torch.testing.assert_close(result.loss, f64(20.0))
    assert not result.clipped_dual.any()


def test_on_policy_gradient_is_the_policy_gradient() -> None:
    """At ratio 1 both branches are equal; a wrong tie-break would halve the gradient or lose it."""
    logp, advantages = doubles(2, 3, grad=True), doubles(2, 3, seed=1)
    (grad,) = torch.autograd.grad(clipped_surrogate(logp, logp.detach(), advantages).loss.sum(), logp)
    torch.testing.assert_close(grad, -advantages)


def test_advantages_per_response_are_broadcast_over_its_tokens() -> None:
    logp, old_logp, advantages = doubles(2, 3), doubles(2, 3, seed=1), f64(1.0, -2.0)[:, None]
    short = clipped_surrogate(logp, old_logp, advantages)
    full = clipped_surrogate(logp, old_logp, advantages.expand(2, 3))
    for one, other in zip(short, full, strict=True):
        assert one.shape == (2, 3)
        assert torch.equal(one, other)


def test_surrogate_passes_gradcheck_away_from_its_kinks() -> None:
    ratios = f64(0.4, 0.9, 1.1, 1.26, 1.6, 4.0, 15.0)
    logp = ratios.log().repeat(2, 1).requires_grad_()
    advantages = f64(1.5, -0.5)[:, None]
    assert gradcheck(lambda x: clipped_surrogate(x, torch.zeros_like(x), advantages).loss, logp)


@pytest.mark.parametrize("advantage", [1.0, -1.0])
@pytest.mark.parametrize(("logp", "old_logp"), [(-1e4, -1.0), (-torch.inf, -1.0), (-1.0, -1e4), (-1.0, -torch.inf)])
def test_impossible_tokens_leave_loss_and_kl_finite(logp: float, old_logp: float, advantage: float) -> None:
    new, old = torch.tensor([logp], requires_grad=True), torch.tensor([old_logp])
    loss = clipped_surrogate(new, old, torch.tensor([advantage]), dual_clip=None).loss + approximate_kl(new, old)
    (grad,) = torch.autograd.grad(loss.sum(), new)
    assert loss.isfinite().all()
    assert grad.isfinite().all()


# KL.


def test_k3_of_known_ratios() -> None:
    """r = 2: 2 − 1 − ln 2. r = 1/3: 1/3 − 1 + ln 3. r = 1: 0."""
    torch.testing.assert_close(
        approximate_kl(f64(LN2 - 1, -LN3 - 1, -1), f64(-1, -1, -1)), f64(1 - LN2, LN3 - 2 / 3, 0.0)
    )


def test_k3_is_unbiased_for_the_kl_from_the_old_policy() -> None:
    """The exact expectation under π_old is KL(π_old ‖ π), and not the other direction."""
    logp, old_logp = doubles(6).log_softmax(0), doubles(6, seed=1).log_softmax(0)
    old, new = old_logp.exp().numpy(), logp.exp().numpy()
    forward, backward = (old * np.log(old / new)).sum(), (new * np.log(new / old)).sum()
    assert abs(forward - backward) > 0.01
    np.testing.assert_allclose((old_logp.exp() * approximate_kl(logp, old_logp)).sum().item(), forward, rtol=1e-12)


def test_k3_passes_gradcheck() -> None:
    assert gradcheck(approximate_kl, (doubles(2, 3, grad=True), doubles(2, 3, seed=1, grad=True)))


@quick
@given(st.floats(-50, 50).filter(lambda x: abs(x) > 1e-6))
def test_k3_is_never_negative(log_ratio: float) -> None:
    assert approximate_kl(f64(log_ratio - 2), f64(-2)) > 0


def test_k3_is_accurate_for_policies_that_barely_differ() -> None:
    """The first updates after a rollout have log-ratios around 1e-4; k3 of them is about x²/2, never negative."""
    log_ratio = torch.linspace(-1e-3, 1e-3, 2001)
    kl = approximate_kl(log_ratio, torch.zeros_like(log_ratio))
    assert (kl >= 0).all()
    x = log_ratio.double()
    torch.testing.assert_close(kl.double(), x**2 / 2 + x**3 / 6, rtol=1e-3, atol=1e-10)


# Means.


def test_token_mean_divides_by_the_tokens_of_the_whole_step() -> None:
    values, mask = torch.tensor([[1.0, 2.0, 100.0], [4.0, 100.0, 100.0]]), torch.tensor([[1, 1, 0], [1, 0, 0]])
    assert token_mean(values, mask, 10.0).item() == pytest.approx(0.7)
    assert token_mean(values, mask.bool(), torch.tensor(3)).item() == pytest.approx(7 / 3)


def test_token_mean_ignores_padding_whatever_is_there() -> None:
    """nan·0 is nan: multiplying with the mask would let padding poison the loss and its gradient."""
    values = torch.tensor([[1.0, torch.nan, torch.inf]], requires_grad=True)
    loss = token_mean(values, torch.tensor([[True, False, False]]), 2.0)
    loss.backward()
    assert loss.item() == 0.5
    assert values.grad.tolist() == [[0.5, 0.0, 0.0]]


def test_token_mean_of_no_tokens_is_zero() -> None:
    assert token_mean(torch.full((2, 2), torch.nan), torch.zeros(2, 2), 5.0).item() == 0.0


def test_token_mean_passes_gradcheck() -> None:
    mask = torch.tensor([[1, 1, 0], [0, 1, 1]])
    assert gradcheck(lambda x: token_mean(x, mask, 7.0), doubles(2, 3, grad=True))


@quick
@given(st.data())
def test_token_mean_does_not_depend_on_how_the_step_is_cut(data: st.DataObject) -> None:
    parts = data.draw(st.lists(st.integers(0, 3), min_size=6, max_size=6), label="micro-batch of each row")
    mask = torch.tensor(data.draw(st.lists(st.booleans(), min_size=24, max_size=24))).reshape(6, 4)
    values, num_tokens = doubles(6, 4), mask.sum().clamp(min=1)
    in_parts = sum(
        token_mean(values[rows], mask[rows], num_tokens) for part in range(4) for rows in [torch.tensor(parts) == part]
    )
    valid = values[mask].tolist()
    assert in_parts.item() == pytest.approx(math.fsum(valid) / max(len(valid), 1), abs=1e-12)


def test_masked_mean_counts_only_valid_places() -> None:
    values = torch.tensor([1.0, 2.0, torch.nan, 6.0])
    assert masked_mean(values, torch.tensor([1, 1, 0, 1])).item() == 3.0
    assert masked_mean(values, torch.zeros(4)).item() == 0.0


def test_masked_covariance_by_hand() -> None:
    """x − 2 = (−1, 0, 1), y − 5 = (−3, −1, 4): (3 + 0 + 4) / 3, divided by n and not n − 1."""
    x, y = f64(1, 2, torch.nan, 3), f64(2, 4, 50, 9)
    assert masked_covariance(x, y, torch.tensor([1, 1, 0, 1])).item() == pytest.approx(7 / 3)
    assert masked_covariance(x, y, torch.zeros(4)).item() == 0.0


def test_masked_covariance_agrees_with_numpy() -> None:
    x, y, mask = doubles(5, 7), doubles(5, 7, seed=1) + 3, doubles(5, 7, seed=2) > 0
    expected = np.cov(x[mask].numpy(), y[mask].numpy(), bias=True)[0, 1]
    assert masked_covariance(x, y, mask).item() == pytest.approx(expected, rel=1e-12)


def test_masked_covariance_passes_gradcheck() -> None:
    mask = torch.tensor([[1, 1, 0], [0, 1, 1]])
    inputs = (doubles(2, 3, grad=True), doubles(2, 3, seed=1, grad=True))
    assert gradcheck(lambda x, y: masked_covariance(x, y, mask), inputs)


# Advantages.


def test_group_advantages_by_hand_for_unsorted_groups() -> None:
    """Group 0 holds 3, 1, 2 (mean 2, std 1); group 1 holds −1, 1 (mean 0, std √2)."""
    advantages = group_advantages(f64(3, -1, 1, 1, 2), torch.tensor([0, 1, 0, 1, 0]))
    one, half = 1 / (1 + 1e-6), 1 / (math.sqrt(2) + 1e-6)
    torch.testing.assert_close(advantages, f64(one, -half, -one, half, 0.0), rtol=1e-12, atol=1e-12)


def test_group_advantages_use_the_epsilon_that_they_are_given() -> None:
    advantages = group_advantages(f64(3, 1, 2), torch.tensor([0, 0, 0]), epsilon=1.0)
    torch.testing.assert_close(advantages, f64(0.5, -0.5, 0.0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("reward", [0.1, -0.3, 1.0, 1e8 + 0.1])
@pytest.mark.parametrize("size", [1, 2, 3, 7, 16])
def test_equal_rewards_give_exactly_zero(reward: float, size: int, dtype: torch.dtype) -> None:
    """0.1 + 0.1 + 0.1 is not 3·0.1, and the rounding error would be blown up by 1/ε."""
    rewards = torch.full((size,), reward, dtype=dtype)
    advantages = group_advantages(rewards, torch.zeros(size, dtype=torch.long))
    assert advantages.dtype == dtype
    assert advantages.tolist() == [0.0] * size


def test_a_large_common_reward_does_not_blur_small_differences() -> None:
    """Centred in float32, the mean of 10,000 + 2⁻¹⁰·(0, 1, 2, ...) would be off by as much as the differences."""
    steps = torch.arange(11, dtype=torch.float64)
    advantages = group_advantages((10_000 + steps / 1024).float(), torch.zeros(11, dtype=torch.long))
    expected = (steps - 5) / (math.sqrt(11) + 1024e-6)  # the standard deviation of 0..10 is √11
    torch.testing.assert_close(advantages.double(), expected, rtol=1e-6, atol=1e-7)


def test_a_group_of_one_gets_zero_next_to_others() -> None:
    advantages = group_advantages(torch.tensor([5.0, 1.0, 0.0]), torch.tensor([1, 0, 0]))
    assert advantages[0].item() == 0.0
    assert advantages[1].item() == pytest.approx(0.5 / (math.sqrt(0.5) + 1e-6))


def test_no_responses_no_advantages() -> None:
    assert group_advantages(torch.zeros(0), torch.zeros(0, dtype=torch.long)).shape == (0,)


def test_integer_rewards_have_the_same_advantages_as_float_ones() -> None:
    """A reward written as ``1 if right else 0`` is an int; a silent 0 would be a run that never learns."""
    advantages = group_advantages(torch.tensor([1, -1]), torch.tensor([0, 0]))
    assert advantages.double().tolist() == pytest.approx([math.sqrt(0.5), -math.sqrt(0.5)], rel=1e-5)


@quick
@given(st.data())
def test_group_advantages_are_standardised_and_follow_a_permutation(data: st.DataObject) -> None:
    size = data.draw(st.integers(1, 12))
    rewards = f64(*data.draw(st.lists(st.sampled_from([-1.0, -0.4, 0.1, 1.0]), min_size=size, max_size=size)))
    groups = torch.tensor([0, *data.draw(st.lists(st.integers(0, 2), min_size=size - 1, max_size=size - 1))])
    order = torch.tensor(data.draw(st.permutations(range(size))))
    advantages = group_advantages(rewards, groups)
    permuted = group_advantages(rewards[order], groups[order])
    torch.testing.assert_close(permuted, advantages[order], rtol=1e-9, atol=1e-12)
    for group in groups.unique():
        values, result = rewards[groups == group].numpy(), advantages[groups == group].numpy()
        spread = values.std(ddof=1) if len(values) > 1 else 0.0
        expected = (values - values.mean()) / (spread + 1e-6) if len(set(values)) > 1 else np.zeros(len(values))
        np.testing.assert_allclose(result, expected, rtol=1e-9, atol=1e-12)


# Reward shaping and group selection.


def test_overlong_penalty_of_the_published_run() -> None:
    """20,480 tokens with a buffer of 4,096: 0 up to 16,384, half-way down at 18,432, −1 from the limit on."""
    lengths = torch.tensor([1, 16_384, 17_408, 18_432, 20_480, 30_000])
    penalty = overlong_penalty(lengths, max_tokens=20_480, buffer_tokens=4_096)
    assert penalty.tolist() == [0.0, 0.0, -0.25, -0.5, -1.0, -1.0]


def test_overlong_penalty_is_scaled_by_its_factor() -> None:
    penalty = overlong_penalty(torch.tensor([5, 8, 10]), max_tokens=10, buffer_tokens=4, factor=2.0)
    assert penalty.tolist() == [0.0, -1.0, -2.0]


def test_informative_groups_are_neither_all_right_nor_all_wrong() -> None:
    accuracy = torch.tensor([1.0, 0.0, 1.0, 0.0, 1.0, 0.0, 0.5, 0.0])
    groups = torch.tensor([2, 0, 1, 0, 2, 1, 3, 3])
    assert informative_groups(accuracy, groups).tolist() == [False, True, False, True]


def test_a_group_whose_accuracies_are_equal_is_never_informative() -> None:
    """Not even with partial credit: its advantages are all 0. Different partial credits are informative."""
    accuracy, groups = torch.tensor([1.0, 0.0, 0.5, 0.5, 0.5, 0.25]), torch.tensor([0, 1, 2, 2, 3, 3])
    assert informative_groups(accuracy, groups).tolist() == [False, False, False, True]


# Evaluation.


def test_avg_at_k_is_the_share_of_right_samples() -> None:
    assert avg_at_k(torch.tensor([[1, 0, 0, 0], [1, 1, 0, 1]])).tolist() == [0.25, 0.75]


@pytest.mark.parametrize("n", [1, 2, 5, 7])
def test_pass_at_k_equals_the_share_of_all_subsets_with_a_right_sample(n: int) -> None:
    rows = [[1] * c + [0] * (n - c) for c in range(n + 1)]
    for k in range(1, n + 1):
        subsets = list(itertools.combinations(range(n), k))
        expected = [sum(any(row[i] for i in subset) for subset in subsets) / len(subsets) for row in rows]
        assert pass_at_k(torch.tensor(rows), k).tolist() == pytest.approx(expected, abs=1e-12)


def test_pass_at_k_of_many_samples_does_not_overflow() -> None:
    """C(2000, 1000) has 600 digits; the expectation comes from exact integers."""
    correct = torch.zeros(1, 2000)
    correct[0, :3] = 1
    expected = 1 - Fraction(math.comb(1997, 1000), math.comb(2000, 1000))
    assert pass_at_k(correct, 1000).item() == pytest.approx(float(expected), rel=1e-9)


@pytest.mark.parametrize("k", [0, -1, 5])
def test_pass_at_k_refuses_more_attempts_than_samples(k: int) -> None:
    with pytest.raises(ValueError, match=rf"between 1 and the number of samples 4, got {k}"):
        pass_at_k(torch.zeros(2, 4), k)


def test_pass_at_k_stays_on_the_device_of_its_input() -> None:
    """The meta device stands in for a GPU: mixing it with CPU tensors fails in the same way."""
    assert pass_at_k(torch.zeros(2, 4, device="meta"), 2).device.type == "meta"


def test_bootstrap_interval_has_the_width_of_the_normal_approximation() -> None:
    scores = torch.rand(400, generator=torch.Generator().manual_seed(1))
    low, high = bootstrap_interval(scores)
    error = 1.96 * scores.double().std(correction=0).item() / math.sqrt(400)
    assert low == pytest.approx(scores.mean().item() - error, abs=0.1 * error)
    assert high == pytest.approx(scores.mean().item() + error, abs=0.1 * error)


def test_bootstrap_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    """300 experiments of 60 questions: 95 % intervals cover about 93-95 %, 50 % intervals about half."""
    scores = (torch.rand(300, 60, generator=torch.Generator().manual_seed(2)) < 0.4).double()
    for level, least, most in ((0.95, 0.90, 0.98), (0.5, 0.40, 0.60)):
        intervals = [bootstrap_interval(row, level=level, resamples=300, seed=i) for i, row in enumerate(scores)]
        covered = sum(low <= 0.4 <= high for low, high in intervals) / len(intervals)
        assert least <= covered <= most


def test_bootstrap_interval_repeats_itself_and_depends_on_its_seed() -> None:
    scores = doubles(30)
    assert bootstrap_interval(scores, seed=3) == bootstrap_interval(scores, seed=3)
    assert bootstrap_interval(scores, seed=3) != bootstrap_interval(scores, seed=4)


def test_bootstrap_interval_of_equal_scores_is_a_point_and_of_none_is_nan() -> None:
    assert bootstrap_interval(torch.full((5,), 0.25)) == (0.25, 0.25)
    assert all(math.isnan(bound) for bound in bootstrap_interval(torch.zeros(0)))
