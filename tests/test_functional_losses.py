"""Policy and value losses, KL and mismatch weights, by hand or against a second formula in float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, get_args

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import gradcheck

from helpers.tensors import doubles, f64, prefix_mask
from ibro_lightning.functional import (
    ClippedSurrogate,
    KLEstimator,
    MismatchWeights,
    aggregate,
    approximate_kl,
    cispo_surrogate,
    clipped_surrogate,
    clipped_value_loss,
    gspo_surrogate,
    information_bottleneck_objective,
    kl_divergence,
    mismatch_diagnostics,
    mismatch_weights,
    token_mean,
)

torch.set_num_threads(1)
quick = settings(max_examples=40, deadline=None)
LN2, LN3, LN4, LN8 = (math.log(x) for x in (2, 3, 4, 8))
NAN, INF = math.nan, math.inf
exactly = {"rtol": 0, "atol": 0}
closely = {"rtol": 1e-12, "atol": 1e-12}


def flags(result: ClippedSurrogate) -> list[Tensor]:
    return [result.clipped_low, result.clipped_high, result.clipped_dual]


# GSPO.


def sequence_mean(values: Tensor, mask: Tensor) -> Tensor:
    sequences = mask.any(1).sum()
    return aggregate(values, mask, "seq-mean-token-mean", num_tokens=mask.sum(), num_sequences=sequences)


def written_out_gspo(
    logp: Tensor, old_logp: Tensor, advantages: Tensor, lengths: list[int], low: float, high: float, dual: float | None
) -> Tensor:
    """The mean over responses of −min(sA, clip(s)A), s differentiated as what it is: exp of a mean."""
    losses = []
    for row, length in enumerate(lengths):
        if length:
            ratio = (logp[row, :length] - old_logp[row, :length]).mean().exp()
            advantage = advantages[row]
            loss = -torch.minimum(ratio * advantage, ratio.clamp(1 - low, 1 + high) * advantage)
            losses.append(torch.minimum(loss, -dual * advantage) if dual is not None and advantage < 0 else loss)
    return sum(losses) / len(losses)


# mean log-ratio of the row, A, loss of each token, (low, high, dual); ε_low = 0.2, ε_high = 0.25, c = 3
GSPO_CASES = [
    (0.0, 2.0, -2.0, ()),
    (math.log(1.2), 2.0, -2.4, ()),
    (LN2, 2.0, -2.5, ("high",)),
    (-LN2, 2.0, -1.0, ()),
    (math.log(0.9), -1.0, 0.9, ()),
    (-LN2, -1.0, 0.8, ("low",)),
    (LN2, -1.0, 2.0, ()),
    (LN8, -1.0, 3.0, ("dual",)),
    (LN8, 0.0, 0.0, ()),
]


@pytest.mark.parametrize(("mean", "advantage", "loss", "expected"), GSPO_CASES)
def test_gspo_clips_a_response_as_a_whole(
    mean: float, advantage: float, loss: float, expected: tuple[str, ...]
) -> None:
    """Two tokens whose own ratios are far from that of the response; a third one is padding."""
    log_ratio = f64([mean + 1, mean - 1, NAN])
    logp, mask = (log_ratio - 2).requires_grad_(), torch.tensor([[1, 1, 0]])
    bounds = {"clip_ratio_low": 0.2, "clip_ratio_high": 0.25, "dual_clip": 3.0}
    result = gspo_surrogate(logp, f64([-2, -2, 5]), f64([advantage]), mask, **bounds)
    torch.testing.assert_close(result.loss, f64([loss, loss, 0]), **closely)
    for name, flag in zip(("low", "high", "dual"), flags(result), strict=True):
        assert flag.tolist() == [[name in expected] * 2 + [False]]
    (grad,) = torch.autograd.grad(result.loss.sum(), logp)
    each = 0.0 if expected else -math.exp(mean) * advantage
    torch.testing.assert_close(grad, f64([each, each, 0]), **closely)


def test_gspo_has_the_bounds_of_the_paper_and_no_dual_clip() -> None:
    advantages, mask = f64([1], [-1], [-1]), torch.ones(3, 2)
    result = gspo_surrogate(f64([LN2] * 2, [-LN2] * 2, [LN8] * 2), torch.zeros(3, 2), advantages, mask)
    torch.testing.assert_close(result.loss, f64([-1.0004] * 2, [0.9997] * 2, [8] * 2), **closely)


@pytest.mark.parametrize("dual", [None, 1.5])
def test_gspo_is_the_sequence_objective_and_has_its_gradient(dual: float | None) -> None:
    lengths = [7, 1, 4, 0, 3, 5]
    mask, advantages = prefix_mask(lengths, 7), f64(1, -1, -2, 5, 0.5, -0.3)
    old_logp = doubles(6, 7, seed=1)
    logp = (old_logp + 0.7 * doubles(6, 7, seed=2)).requires_grad_()
    result = gspo_surrogate(
        logp, old_logp, advantages[:, None], mask, clip_ratio_low=0.1, clip_ratio_high=0.15, dual_clip=dual
    )
    assert 0 < result.clipped_low.sum() + result.clipped_high.sum() < mask.sum()  # both kinds of rows are tested
    expected = written_out_gspo(logp, old_logp, advantages, lengths, 0.1, 0.15, dual)
    actual = sequence_mean(result.loss, mask)
    torch.testing.assert_close(actual, expected, **closely)
    (expected_grad,), (grad,) = (torch.autograd.grad(x, logp) for x in (expected, actual))
    torch.testing.assert_close(grad, expected_grad, **closely)
    assert (grad != 0).any()


def test_gspo_on_policy_gradient_is_the_policy_gradient() -> None:
    logp, advantages, mask = doubles(2, 3, grad=True), f64([1.5], [-2]), torch.ones(2, 3)
    (grad,) = torch.autograd.grad(gspo_surrogate(logp, logp.detach(), advantages, mask).loss.sum(), logp)
    torch.testing.assert_close(grad, -advantages.expand(2, 3), **closely)


def test_gspo_takes_advantages_per_token() -> None:
    """GSPO-token: every token has the ratio of the response and an advantage of its own."""
    logp, advantages = f64([-1, -3]).requires_grad_(), f64([2, -1])
    result = gspo_surrogate(logp, f64([-2, -2]), advantages, torch.ones(1, 2))
    torch.testing.assert_close(result.loss, -advantages, **closely)
    torch.testing.assert_close(torch.autograd.grad(result.loss.sum(), logp)[0], -advantages, **closely)


def test_gspo_of_one_token_is_the_clipped_surrogate() -> None:
    logp, old_logp, advantages = doubles(1, 1), doubles(1, 1, seed=1), f64([-1.3])
    bounds = {"clip_ratio_low": 0.2, "clip_ratio_high": 0.28, "dual_clip": 10.0}
    one = gspo_surrogate(logp, old_logp, advantages, torch.ones(1, 1), **bounds)
    for x, y in zip(one, clipped_surrogate(logp, old_logp, advantages, **bounds), strict=True):
        torch.testing.assert_close(x, y)


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@pytest.mark.parametrize("lengths", [[2, 0], [0, 0]])
def test_gspo_ignores_padding_and_empty_rows(bad: float, lengths: list[int]) -> None:
    mask = prefix_mask(lengths, 3)
    inputs = [torch.where(mask, doubles(2, 3, seed=seed), bad).requires_grad_() for seed in range(3)]
    logp, old_logp, advantages = inputs
    result = gspo_surrogate(logp, old_logp, advantages, mask, dual_clip=2.0)
    assert result.loss.isfinite().all()
    assert (result.loss[~mask] == 0).all()
    assert not any(flag[~mask].any() for flag in flags(result))
    (grad,) = torch.autograd.grad(result.loss.sum(), logp)
    assert grad.isfinite().all()
    assert (grad[~mask] == 0).all()


@pytest.mark.parametrize("advantage", [1.0, -1.0])
@pytest.mark.parametrize(("new", "old"), [(-1e4, -1.0), (-INF, -1.0), (-1.0, -1e4), (-1.0, -INF), (-INF, -INF)])
@pytest.mark.parametrize("surrogate", [gspo_surrogate, cispo_surrogate])
def test_impossible_tokens_leave_loss_and_gradient_finite(
    surrogate: Callable[..., ClippedSurrogate], new: float, old: float, advantage: float
) -> None:
    logp, old_logp = torch.tensor([[new, -1.0]], requires_grad=True), torch.tensor([[old, -1.0]])
    masks = [torch.ones(1, 2)] if surrogate is gspo_surrogate else []
    result = surrogate(logp, old_logp, torch.tensor([[advantage]]), *masks)
    (grad,) = torch.autograd.grad(result.loss.sum(), logp)
    assert result.loss.isfinite().all()
    assert grad.isfinite().all()


@quick
@given(st.lists(st.integers(0, 5), min_size=1, max_size=5), st.data())
def test_gspo_depends_on_neither_cut_order_nor_padding(lengths: list[int], data: st.DataObject) -> None:
    rows = len(lengths)
    mask, order = prefix_mask(lengths, 5), torch.tensor(data.draw(st.permutations(range(rows))))
    inputs = [doubles(rows, 5), doubles(rows, 5, seed=1), doubles(rows, 1, seed=2)]
    whole = gspo_surrogate(*inputs, mask, clip_ratio_low=0.3, clip_ratio_high=0.3)
    permuted = gspo_surrogate(*(x[order] for x in inputs), mask[order], clip_ratio_low=0.3, clip_ratio_high=0.3)
    torch.testing.assert_close(permuted.loss, whole.loss[order], **closely)
    wider = [torch.nn.functional.pad(torch.where(mask, x, NAN), (0, 2), value=NAN) for x in inputs[:2]]
    padding = torch.nn.functional.pad(mask.int(), (0, 2))
    padded = gspo_surrogate(*wider, inputs[2], padding, clip_ratio_low=0.3, clip_ratio_high=0.3)
    torch.testing.assert_close(padded.loss[:, :5], whole.loss, **closely)
    assert (padded.loss[:, 5:] == 0).all()


# CISPO.

# ratio, A, weight, (low, high); ε_low = 0.2, ε_high = 0.28
CISPO_CASES = [
    (1.0, 2.0, 1.0, ()),
    (1.1, -2.0, 1.1, ()),
    (1.5, 1.0, 1.28, ("high",)),
    (1.5, -1.0, 1.28, ("high",)),
    (0.5, 1.0, 0.8, ("low",)),
    (0.5, -3.0, 0.8, ("low",)),
    (30.0, 0.0, 1.28, ("high",)),
]


@pytest.mark.parametrize(("ratio", "advantage", "weight", "expected"), CISPO_CASES)
def test_cispo_clips_the_weight_and_keeps_the_gradient(
    ratio: float, advantage: float, weight: float, expected: tuple[str, ...]
) -> None:
    logp, old_logp = f64(-1.5).requires_grad_(), f64(-1.5 - math.log(ratio))
    result = cispo_surrogate(logp, old_logp, f64(advantage), clip_ratio_low=0.2, clip_ratio_high=0.28)
    torch.testing.assert_close(result.loss, f64(weight * advantage * 1.5), **closely)
    assert [flag.item() for flag in flags(result)] == ["low" in expected, "high" in expected, False]
    (grad,) = torch.autograd.grad(result.loss.sum(), logp)
    torch.testing.assert_close(grad, f64(-weight * advantage), **closely)


def test_cispo_has_no_lower_bound_by_default_and_a_largest_weight_of_5() -> None:
    logp = f64(-3, -3, -3).requires_grad_()
    result = cispo_surrogate(logp, logp.detach() - f64(-9, math.log(4.9), math.log(5.1)), f64(1, 1, 1))
    (grad,) = torch.autograd.grad(result.loss.sum(), logp)
    torch.testing.assert_close(grad, f64(-math.exp(-9), -4.9, -5), **closely)
    assert result.clipped_low.tolist() == [False] * 3
    assert result.clipped_high.tolist() == [False, False, True]


def test_cispo_gradient_is_that_of_a_loss_with_constant_weights() -> None:
    """The ratio must be detached: differentiated as well, the gradient would be −r A (1 + log π)."""
    logp, old_logp, advantages = doubles(3, 4, grad=True), doubles(3, 4, seed=1), doubles(3, 1, seed=2)
    result = cispo_surrogate(logp, old_logp, advantages, clip_ratio_low=0.5, clip_ratio_high=0.5)
    weight = np.clip(np.exp((logp.detach() - old_logp).numpy()), 0.5, 1.5)
    (grad,) = torch.autograd.grad(result.loss.sum(), logp)
    np.testing.assert_allclose(grad.numpy(), -weight * advantages.numpy(), rtol=1e-12)
    np.testing.assert_allclose(result.loss.detach(), -weight * advantages.numpy() * logp.detach().numpy(), rtol=1e-12)
    assert all(flag.shape == (3, 4) for flag in flags(result))


# The value loss.

# V, V_old, R, loss, clipped, gradient; clip = 0.5
VALUE_CASES = [
    (1.2, 1.0, 2.0, 0.32, False, -0.8),  # within the clip: plain squared error
    (1.9, 1.0, 2.0, 0.125, True, 0.0),  # has already moved by more than 0.5 towards its return
    (0.2, 1.0, 2.0, 1.62, False, -1.8),  # has moved away from it
    (2.0, 1.0, 2.0, 0.125, True, 0.0),
    (4.0, 1.0, 2.0, 2.0, False, 2.0),  # has overshot by more than the clip leaves short
    (1.9, 1.0, 1.2, 0.245, False, 0.7),
    (-1.9, -1.0, -2.0, 0.125, True, 0.0),
    (1.0, 1.0, 1.0, 0.0, False, 0.0),
]


@pytest.mark.parametrize(("value", "old", "target", "loss", "clipped", "gradient"), VALUE_CASES)
def test_value_loss_flag_and_gradient(
    value: float, old: float, target: float, loss: float, clipped: bool, gradient: float
) -> None:
    values = f64(value).requires_grad_()
    result = clipped_value_loss(values, f64(old), f64(target))
    torch.testing.assert_close(result.loss, f64(loss), **closely)
    assert result.clipped.tolist() == [clipped]
    torch.testing.assert_close(torch.autograd.grad(result.loss.sum(), values)[0], f64(gradient), **closely)


def test_value_clipping_uses_its_bound_and_can_be_switched_off() -> None:
    values, old_values, returns = f64([3.0]), f64([1.0]), f64([4.0])
    assert clipped_value_loss(values, old_values, returns, clip=1.0).loss.item() == 2.0
    assert clipped_value_loss(values, old_values, returns, clip=5.0).loss.item() == 0.5
    off = clipped_value_loss(values, old_values, returns, clip=None)
    assert off.loss.item() == 0.5
    assert off.clipped.tolist() == [[False]]
    assert off.clipped.dtype == torch.bool


@pytest.mark.parametrize("clip", [None, 0.3])
def test_value_loss_agrees_with_numpy_and_passes_gradcheck(clip: float | None) -> None:
    values, old_values, returns = doubles(4, 5, grad=True), doubles(4, 5, seed=1), doubles(4, 5, seed=2)
    result = clipped_value_loss(values, old_values, returns, clip=clip)
    v, old, r = (x.detach().numpy() for x in (values, old_values, returns))
    inside = v if clip is None else np.clip(v, old - clip, old + clip)
    np.testing.assert_allclose(result.loss.detach(), 0.5 * np.maximum((v - r) ** 2, (inside - r) ** 2), rtol=1e-12)
    assert (result.clipped.any().item(), result.clipped.all().item()) == (clip is not None, False)
    assert gradcheck(lambda x: clipped_value_loss(x, old_values, returns, clip=clip).loss, values)


def test_the_first_update_after_a_rollout_has_the_gradient_of_the_squared_error() -> None:
    """At V = V_old both branches are equal; a wrong tie-break would halve the gradient or lose it."""
    values, returns = doubles(2, 3, grad=True), doubles(2, 3, seed=1)
    (grad,) = torch.autograd.grad(clipped_value_loss(values, values.detach(), returns).loss.sum(), values)
    torch.testing.assert_close(grad, values.detach() - returns, **closely)


# KL estimators.

ESTIMATORS = get_args(KLEstimator)


def test_kl_estimates_of_known_ratios() -> None:
    """r = π/π_ref = 2, 1/3, 1."""
    logp, ref_logp = f64(LN2 - 1, -LN3 - 1, -1), f64(-1, -1, -1)
    torch.testing.assert_close(kl_divergence(logp, ref_logp, "k1"), f64(LN2, -LN3, 0), **closely)
    torch.testing.assert_close(kl_divergence(logp, ref_logp, "k2"), f64(LN2**2 / 2, LN3**2 / 2, 0), **closely)
    k3 = f64(0.5 - 1 + LN2, 3 - 1 - LN3, 0)
    torch.testing.assert_close(kl_divergence(logp, ref_logp, "k3"), k3, **closely)
    torch.testing.assert_close(kl_divergence(logp, ref_logp, "k3_k2_grad"), k3, **closely)
    assert torch.equal(kl_divergence(logp, ref_logp), kl_divergence(logp, ref_logp, "k3"))


def test_an_unknown_estimator_is_answered_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match="k1, k2, k3, k3_k2_grad; got 'k4'"):
        kl_divergence(torch.zeros(1), torch.zeros(1), "k4")


def kl(p: Tensor, q: Tensor) -> Tensor:
    return (p * (p / q).log()).sum()


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_expected_value_over_the_vocabulary(estimator: KLEstimator) -> None:
    """The exact expectation under π: k1 and k3 give KL(π ‖ π_ref), and not the other direction; k2 is biased."""
    logp, ref_logp = doubles(7).log_softmax(0), doubles(7, seed=1).log_softmax(0)
    p, q = logp.exp(), ref_logp.exp()
    expectation = (p * kl_divergence(logp, ref_logp, estimator)).sum().item()
    assert abs(kl(p, q) - kl(q, p)) > 0.01
    if estimator == "k2":
        assert abs(expectation - kl(p, q)) > 0.01
        assert expectation == pytest.approx((p * (p / q).log() ** 2).sum().item() / 2, rel=1e-12)
    else:
        assert expectation == pytest.approx(kl(p, q).item(), rel=1e-12)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_expected_gradient_over_the_vocabulary(estimator: KLEstimator) -> None:
    """Tokens are sampled, so their probabilities carry no gradient. Only k2's gradient is that of KL(π ‖ π_ref)."""
    logits, q = doubles(7, grad=True), doubles(7, seed=1).softmax(0)
    p = logits.softmax(0)
    forward, backward = (torch.autograd.grad(x, logits, retain_graph=True)[0] for x in (kl(p, q), kl(q, p)))
    loss = (p.detach() * kl_divergence(logits.log_softmax(0), q.log(), estimator)).sum()
    (grad,) = torch.autograd.grad(loss, logits)
    assert (forward - backward).abs().max() > 0.01
    expected = {"k1": torch.zeros(7).double(), "k2": forward, "k3": backward, "k3_k2_grad": forward}[estimator]
    torch.testing.assert_close(grad, expected, **closely)


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_kl_passes_gradcheck(estimator: KLEstimator) -> None:
    inputs = (doubles(2, 3, grad=True), doubles(2, 3, seed=1, grad=True))
    assert gradcheck(lambda x, y: kl_divergence(x, y, estimator), inputs)


def test_k3_with_the_gradient_of_k2() -> None:
    logp, ref_logp = doubles(2, 3, grad=True), doubles(2, 3, seed=1)
    estimate = kl_divergence(logp, ref_logp, "k3_k2_grad")
    torch.testing.assert_close(estimate, kl_divergence(logp, ref_logp, "k3"), **exactly)
    (grad,) = torch.autograd.grad(estimate.sum(), logp)
    torch.testing.assert_close(grad, (logp - ref_logp).detach(), **closely)


@quick
@given(st.floats(-50, 50).filter(lambda x: abs(x) > 1e-6))
def test_k3_is_positive(log_ratio: float) -> None:
    assert kl_divergence(f64(log_ratio - 2), f64(-2)) > 0


def test_k3_is_accurate_for_policies_that_barely_differ() -> None:
    """About x²/2 and never negative, where r' − 1 − log r' cancels in float32."""
    log_ratio = torch.linspace(-1e-3, 1e-3, 2001)
    estimate = kl_divergence(log_ratio, torch.zeros_like(log_ratio))
    x = log_ratio.double()
    assert (estimate >= 0).all()
    torch.testing.assert_close(estimate.double(), x**2 / 2 - x**3 / 6, rtol=1e-3, atol=1e-10)


def test_k3_is_approximate_kl_with_its_arguments_swapped() -> None:
    logp, ref_logp = doubles(3, 4), doubles(3, 4, seed=1)
    torch.testing.assert_close(kl_divergence(logp, ref_logp), approximate_kl(ref_logp, logp), **exactly)


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize(("new", "ref", "log_ratio"), [(-INF, -1.0, -20.0), (-1.0, -INF, 20.0), (-1.0, -1e4, 20.0)])
def test_impossible_tokens_have_a_finite_kl(estimator: KLEstimator, new: float, ref: float, log_ratio: float) -> None:
    logp = f64(new).requires_grad_()
    estimate = kl_divergence(logp, f64(ref), estimator)
    expected = {"k1": log_ratio, "k2": 200.0}.get(estimator, math.expm1(-log_ratio) + log_ratio)
    assert estimate.item() == pytest.approx(expected, rel=1e-12)
    assert torch.autograd.grad(estimate.sum(), logp)[0].tolist() == [0.0]


# Mismatch of trainer and sampler.

# Ratios of the tokens: row 0: 4, 1/4, 2 (product 2, geometric mean ∛2); row 1: 1/8, 1/2 (product 1/16, mean 1/4).
TRAIN = f64([LN4 - 3, -LN4 - 3, LN2 - 3], [-LN8 - 3, -LN2 - 3, NAN])
SAMPLER = f64([-3, -3, -3], [-3, -3, INF])
PAIR_MASK = torch.tensor([[1, 1, 1], [1, 1, 0]])
ROOT = 2 ** (1 / 3)
MISMATCH_CASES: list[tuple[dict[str, Any], list[list[float]], list[list[int]]]] = [
    ({}, [[2, 0.25, 2], [0.125, 0.5, 0]], [[0, 0, 0], [0, 0, 0]]),
    ({"cap": 3.0}, [[3, 0.25, 2], [0.125, 0.5, 0]], [[0, 0, 0], [0, 0, 0]]),
    ({"mode": "mask"}, [[0, 0, 2], [0, 0.5, 0]], [[1, 1, 0], [1, 0, 0]]),
    ({"mode": "mask", "cap": 5.0, "floor": 0.2}, [[4, 0.25, 2], [0, 0.5, 0]], [[0, 0, 0], [1, 0, 0]]),
    ({"mode": "mask", "cap": 3.0, "floor": 0.0}, [[0, 0.25, 2], [0.125, 0.5, 0]], [[1, 0, 0], [0, 0, 0]]),
    ({"level": "sequence"}, [[2, 2, 2], [1 / 16, 1 / 16, 0]], [[0, 0, 0], [0, 0, 0]]),
    ({"level": "sequence", "cap": 1.5}, [[1.5] * 3, [1 / 16, 1 / 16, 0]], [[0, 0, 0], [0, 0, 0]]),
    ({"level": "sequence", "mode": "mask", "cap": 2.1}, [[2, 2, 2], [0, 0, 0]], [[0, 0, 0], [1, 1, 0]]),
    (
        {"level": "sequence", "mode": "mask", "cap": 1.9, "floor": 0.05},
        [[0] * 3, [0.0625] * 2 + [0]],
        [[1] * 3, [0] * 3],
    ),
    ({"level": "geometric"}, [[ROOT] * 3, [0.25, 0.25, 0]], [[0, 0, 0], [0, 0, 0]]),
    ({"level": "geometric", "cap": 1.1}, [[1.1] * 3, [0.25, 0.25, 0]], [[0, 0, 0], [0, 0, 0]]),
    ({"level": "geometric", "mode": "mask"}, [[ROOT] * 3, [0, 0, 0]], [[0, 0, 0], [1, 1, 0]]),
    # Mean absolute log-ratios: 5/3 and 4/2 times log 2, 1.155 and 1.386, where the plain means are 1/3 and -2 times.
    ({"max_difference": 1.4}, [[2, 0.25, 2], [0.125, 0.5, 0]], [[0, 0, 0], [0, 0, 0]]),
    ({"max_difference": 1.2}, [[2, 0.25, 2], [0, 0, 0]], [[0, 0, 0], [1, 1, 0]]),
    ({"max_difference": 1.1}, [[0] * 3, [0] * 3], [[1, 1, 1], [1, 1, 0]]),
    ({"mode": "mask", "max_difference": 1.2}, [[0, 0, 2], [0, 0, 0]], [[1, 1, 0], [1, 1, 0]]),
    ({"level": "geometric", "max_difference": 1.2}, [[ROOT] * 3, [0, 0, 0]], [[0, 0, 0], [1, 1, 0]]),
]


@pytest.mark.parametrize(("arguments", "weights", "masked"), MISMATCH_CASES)
def test_mismatch_weights_by_hand(
    arguments: dict[str, Any], weights: list[list[float]], masked: list[list[int]]
) -> None:
    result = mismatch_weights(TRAIN + 1e-14, SAMPLER, PAIR_MASK, **{"cap": 2 + 1e-12, **arguments})
    torch.testing.assert_close(result.weights, f64(*weights), rtol=1e-11, atol=1e-11)
    assert result.masked.dtype == torch.bool
    assert result.masked.int().tolist() == masked


def test_by_default_ratios_are_truncated_at_2_per_token() -> None:
    explicit = mismatch_weights(TRAIN, SAMPLER, PAIR_MASK, level="token", mode="truncate", cap=2.0)
    assert torch.equal(mismatch_weights(TRAIN, SAMPLER, PAIR_MASK).weights, explicit.weights)


@pytest.mark.parametrize("level", ["token", "sequence", "geometric"])
@pytest.mark.parametrize("mode", ["truncate", "mask"])
@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_a_token_whose_logprob_is_not_finite_is_as_good_as_masked_out(level: str, mode: str, bad: float) -> None:
    """It has weight 0, no say in its row's ratio, and is named; on padding it does not matter at all."""
    for broken in (0, 1):
        logps = [f64([LN2, -LN2, LN4, 0]) / 3 - 2, f64([-2, -2, -2, 0])]
        whole = [x.clone() for x in logps]
        logps[broken][0, 1:4:2] = bad
        result = mismatch_weights(*logps, torch.tensor([[1, 1, 1, 0]]), level=level, mode=mode)
        expected = mismatch_weights(*whole, torch.tensor([[1, 0, 1, 0]]), level=level, mode=mode)
        assert torch.equal(result.weights, expected.weights)
        assert result.weights[0, 1] == result.weights[0, 3] == 0
        assert result.non_finite.tolist() == [[False, True, False, False]]
        assert torch.equal(result.masked, expected.masked), "masked tokens are those out of bounds"
        assert mismatch_diagnostics(*logps, torch.tensor([[1, 1, 1, 0]]))["non_finite"].item() == 1.0


def test_mismatch_weights_are_detached() -> None:
    train = doubles(2, 3, grad=True)
    for level in ("token", "sequence", "geometric"):
        for mode in ("truncate", "mask"):
            assert not mismatch_weights(
                train, doubles(2, 3), torch.ones(2, 3), level=level, mode=mode
            ).weights.requires_grad
    assert not any(x.requires_grad for x in mismatch_diagnostics(train, doubles(2, 3), torch.ones(2, 3)).values())


@pytest.mark.parametrize("level", ["token", "sequence", "geometric"])
def test_extreme_ratios_stay_finite(level: str) -> None:
    train, sampler = torch.tensor([[-1.0, -1.0], [-1e4, -1e4]]), torch.tensor([[-1e4, -1e4], [-1.0, -1.0]])
    truncated = mismatch_weights(train, sampler, torch.ones(2, 2), level=level, cap=INF)
    assert truncated.weights.isfinite().all()
    assert (truncated.weights[0] > 1e8).all()
    assert (truncated.weights[1] < 1e-8).all()
    assert mismatch_weights(train, sampler, torch.ones(2, 2), level=level, mode="mask").masked.all()
    assert all(x.isfinite() for x in mismatch_diagnostics(train, sampler, torch.ones(2, 2)).values())


def test_agreement_means_weight_1_also_in_half_precision() -> None:
    logp = torch.tensor([[-0.5, -7.3]], dtype=torch.bfloat16)
    result = mismatch_weights(logp, logp, torch.ones(1, 2), mode="mask")
    assert result.weights.dtype == torch.float32
    assert result.weights.tolist() == [[1.0, 1.0]]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"level": "word"}, "level must be one of token, sequence, geometric; got 'word'"),
        ({"mode": "drop"}, "mode must be one of truncate, mask; got 'drop'"),
        ({"cap": 0.0}, "cap must be larger than 0"),
        ({"floor": 0.5}, "floor is a bound of mode 'mask'"),
        ({"mode": "mask", "cap": 0.5}, "floor 2.0 and cap 0.5"),
        ({"mode": "mask", "floor": 3.0}, "floor 3.0 and cap 2.0"),
        ({"max_difference": 0.0}, "max_difference must be larger than 0"),
        ({"max_difference": math.nan}, "max_difference must be larger than 0"),
    ],
)
def test_settings_that_mean_nothing_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        mismatch_weights(TRAIN, SAMPLER, PAIR_MASK, **arguments)


def test_importance_weights_turn_the_samplers_expectation_into_the_trainers() -> None:
    train_logp, sampler_logp, value = doubles(6).log_softmax(0), doubles(6, seed=1).log_softmax(0), doubles(6, seed=2)
    weights = mismatch_weights(train_logp[None], sampler_logp[None], torch.ones(1, 6), cap=1e9).weights[0]
    expectation = (sampler_logp.exp() * weights * value).sum()
    torch.testing.assert_close(expectation, (train_logp.exp() * value).sum(), **closely)


def test_mismatch_diagnostics_by_hand() -> None:
    """Ratios 2, 1/2, 1 and one token without a number, which is counted and left out: Σw = 3.5, Σw² = 5.25."""
    train, sampler = f64([LN2 - 3, -LN2 - 3], [-3, -3], [NAN, NAN]), f64([-3, -3], [-3, NAN], [INF, 0])
    mask = torch.tensor([[1, 1], [1, 1], [0, 0]])
    result = mismatch_weights(train, sampler, mask, mode="mask", cap=1.9, floor=0.1)
    measured = mismatch_diagnostics(train, sampler, mask, result)
    expected = {
        "ratio_mean": 3.5 / 3,
        "ratio_max": 2.0,
        "effective_sample_size": 3.5**2 / (3 * 5.25),
        "kl_k1": 0.0,
        "kl_k3": (1 - LN2 - 0.5 + LN2) / 3,  # 2 − 1 − ln 2, ½ − 1 + ln 2, and 0
        "non_finite": 1.0,
        "masked_share": 1 / 3,
    }
    assert {name: x.item() for name, x in measured.items()} == pytest.approx(expected, rel=1e-12, abs=1e-12)
    assert all(x.shape == () and x.is_floating_point() for x in measured.values())
    assert mismatch_diagnostics(train, sampler, mask)["masked_share"].item() == 0.0


def test_kl_diagnostics_are_unbiased_for_the_kl_from_sampler_to_trainer() -> None:
    """Tokens in the proportions 4 : 2 : 1 : 1 of the sampler's probabilities make the mean an exact expectation."""
    q, p = f64(0.5, 0.25, 0.125, 0.125), doubles(4).softmax(0)
    tokens = torch.tensor([[0, 0, 0, 0, 1, 1, 2, 3]])
    measured = mismatch_diagnostics(p.log()[tokens], q.log()[tokens], torch.ones(1, 8))
    assert abs(kl(p, q) - kl(q, p)) > 0.01
    assert measured["kl_k1"].item() == pytest.approx(kl(q, p).item(), rel=1e-12)
    assert measured["kl_k3"].item() == pytest.approx(kl(q, p).item(), rel=1e-12)
    assert measured["ratio_mean"].item() == pytest.approx(1.0, rel=1e-12)


@pytest.mark.parametrize("shape", [(2, 3), (0, 3), (2, 0)])
def test_without_valid_tokens_there_is_no_mismatch(shape: tuple[int, int]) -> None:
    nothing, mask = torch.full(shape, NAN), torch.zeros(shape)
    for level in ("token", "sequence", "geometric"):
        for mode in ("truncate", "mask"):
            result = mismatch_weights(nothing, nothing, mask, level=level, mode=mode)
            assert isinstance(result, MismatchWeights)
            assert torch.equal(result.weights, torch.zeros(shape))
            assert not result.masked.any()
    measured = {name: x.item() for name, x in mismatch_diagnostics(nothing, nothing, mask, result).items()}
    ones = {"ratio_mean", "ratio_max", "effective_sample_size"}
    assert measured == {name: float(name in ones) for name in measured}


@quick
@given(
    st.lists(st.integers(0, 4), min_size=1, max_size=4),
    st.sampled_from(["token", "sequence", "geometric"]),
    st.sampled_from(["truncate", "mask"]),
    st.data(),
)
def test_mismatch_weights_equal_a_plain_loop(lengths: list[int], level: str, mode: str, data: st.DataObject) -> None:
    """In any order of the rows, with any padding; 1.4 as a cap, so that 1/1.4 is the floor of masking."""
    rows, cap = len(lengths), 1.4
    mask, order = prefix_mask(lengths, 4), torch.tensor(data.draw(st.permutations(range(rows))))
    train, sampler = (torch.where(mask, doubles(rows, 4, seed=seed) / 2, NAN) for seed in (0, 1))
    expected, dropped = np.zeros((rows, 4)), np.zeros((rows, 4), dtype=bool)
    for i, length in enumerate(lengths):
        log_ratios = [(train[i, t] - sampler[i, t]).item() for t in range(length)]
        row = {"sequence": math.fsum(log_ratios), "geometric": math.fsum(log_ratios) / max(length, 1)}
        for t in range(length):
            ratio = math.exp(row.get(level, log_ratios[t]))
            dropped[i, t] = mode == "mask" and not 1 / cap <= ratio <= cap
            expected[i, t] = 0.0 if dropped[i, t] else min(ratio, cap)
    result = mismatch_weights(train, sampler, mask, level=level, mode=mode, cap=cap)
    np.testing.assert_allclose(result.weights.numpy(), expected, rtol=1e-12)
    assert (result.masked.numpy() == dropped).all()
    permuted = mismatch_weights(train[order], sampler[order], mask[order], level=level, mode=mode, cap=cap)
    torch.testing.assert_close(permuted.weights, result.weights[order], **closely)
    diagnostics = mismatch_diagnostics(train, sampler, mask, result)
    assert diagnostics["masked_share"].item() == pytest.approx(dropped.sum() / max(sum(lengths), 1))
    assert 0 < diagnostics["effective_sample_size"] <= 1 + 1e-12
    assert diagnostics["kl_k3"] >= 0


# The information-bottleneck term.


def test_the_ib_term_by_hand() -> None:
    entropy, advantages = f64([1.0, 2.0, 9.0], [3.0, 0.5, 9.0]), f64([2.0, 2.0, 2.0], [-1.0, -1.0, -1.0])
    mask = prefix_mask([2, 1], 3)  # three tokens; their mean advantage is 1, their mean entropy 2
    term = information_bottleneck_objective(entropy, advantages, mask)
    assert term[mask].tolist() == [2.0, 4.0, -3.0]
    assert token_mean(term, mask, 3) == 1.0
    assert information_bottleneck_objective(entropy, advantages, mask, part="uniform")[mask].tolist() == [1.0, 2.0, 3.0]
    assert information_bottleneck_objective(entropy, advantages, mask, part="centred")[mask].tolist() == [
        1.0,
        2.0,
        -6.0,
    ]


def test_the_two_parts_of_the_ib_term_add_up_whatever_the_mean_is() -> None:
    entropy, advantages, mask = doubles(3, 4), doubles(3, 4, seed=1), prefix_mask([4, 2, 1], 4)

    def term(part: Any) -> Tensor:
        return information_bottleneck_objective(entropy, advantages, mask, part=part, mean_advantage=0.7)

    torch.testing.assert_close(term("centred") + term("uniform"), term("raw"), **closely)


@pytest.mark.parametrize("part", ["raw", "centred", "uniform", "reversed"])
def test_the_ib_term_moves_entropy_and_no_advantage(part: Any) -> None:
    entropy, advantages = doubles(2, 3, grad=True), doubles(2, 3, seed=1, grad=True)
    mask = prefix_mask([3, 1], 3)
    token_mean(information_bottleneck_objective(entropy, advantages, mask, part=part), mask, 4).backward()
    assert advantages.grad is None
    assert entropy.grad is not None
    mean = advantages.detach()[mask].mean()
    a = advantages.detach()
    weight = {"raw": a, "centred": a - mean, "uniform": mean.expand(2, 3), "reversed": a - 2 * mean}[part]
    torch.testing.assert_close(entropy.grad, torch.where(mask, weight, 0.0) / 4, **closely)
