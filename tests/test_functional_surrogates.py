"""GMPO, DPPO and SAPO: by hand, and against their objectives written out in float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import gradcheck

from helpers.tensors import doubles, f64, prefix_mask
from ibro_lightning.batches.experience import TokenStats
from ibro_lightning.errors import ConfigError
from ibro_lightning.functional import aggregate, dppo_surrogate, gmpo_surrogate, gspo_surrogate, sapo_surrogate
from ibro_lightning.regularizers.coefficients import Linear
from ibro_lightning.update import DPPOLoss, GMPOLoss, PolicyLoss, SAPOLoss
from ibro_lightning.update.surrogates import LOSSES, loss_class

torch.set_num_threads(1)
INF, NAN = math.inf, math.nan
closely = {"rtol": 1e-12, "atol": 1e-12}
quick = settings(max_examples=30, deadline=None)


def gmpo(logp: Tensor, old_logp: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
    return gmpo_surrogate(logp, old_logp, advantages, mask, clip_ratio_low=0.3, clip_ratio_high=0.5).loss


def dppo(logp: Tensor, old_logp: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
    return dppo_surrogate(logp, old_logp, advantages, clip_ratio_low=0.05, clip_ratio_high=0.1).loss * mask


def sapo(logp: Tensor, old_logp: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
    return sapo_surrogate(logp, old_logp, advantages).loss * mask


SURROGATES: list[Callable[..., Tensor]] = [gmpo, dppo, sapo]


# GMPO.


def test_gmpo_clips_tokens_and_then_takes_their_mean() -> None:
    """A = 2: log-ratios 1 and −1 with bounds −0.3 and 0.5 become 0.5 and −1 (pessimistic): exp(−0.25). A = −1: 1 and
    −0.3: exp(0.35)."""
    log_ratio, mask = f64([1, -1, NAN], [1, -1, NAN]), prefix_mask([2, 2], 3)
    logp = (log_ratio - 2).requires_grad_()
    bounds = {"clip_ratio_low": 0.3, "clip_ratio_high": 0.5}
    result = gmpo_surrogate(logp, torch.full((2, 3), -2.0), f64([2], [-1]), mask, **bounds)
    first, second = -2 * math.exp(-0.25), math.exp(0.35)
    torch.testing.assert_close(result.loss, f64([first, first, 0], [second, second, 0]), **closely)
    assert result.clipped_high.tolist() == [[True, False, False], [False, False, False]]
    assert result.clipped_low.tolist() == [[False, False, False], [False, True, False]]
    assert not result.clipped_dual.any()
    (gradient,) = torch.autograd.grad(result.loss.sum(), logp)
    torch.testing.assert_close(gradient, f64([0, first, 0], [second, 0, 0]), **closely)


def test_gmpo_has_the_papers_bounds() -> None:
    result = gmpo_surrogate(f64([1, 1], [-1, -1]), torch.zeros(2, 2), f64([1], [-1]), torch.ones(2, 2))
    torch.testing.assert_close(result.loss, f64([-math.exp(0.4)] * 2, [math.exp(-0.4)] * 2), **closely)


def test_gmpo_is_the_sequence_objective_and_has_its_gradient() -> None:
    """The mean over responses of −A·(Π_t clipped r_t)^(1/T), in numbers that are differentiated as they are."""
    lengths, advantages = [7, 1, 4, 3], f64(1.0, -1.0, -2.0, 0.5)
    mask, old_logp = prefix_mask(lengths, 7), doubles(4, 7, seed=1)
    logp = (old_logp + 0.7 * doubles(4, 7, seed=2)).requires_grad_()
    actual = aggregate(
        gmpo(logp, old_logp, advantages[:, None], mask), mask, "seq-mean-token-mean", num_tokens=15, num_sequences=4
    )
    expected = f64(0.0).sum()
    for row, length in enumerate(lengths):
        sign = advantages[row].sign()
        log_ratio = logp[row, :length] - old_logp[row, :length]
        pessimistic = sign * torch.minimum(sign * log_ratio, sign * log_ratio.clamp(-0.3, 0.5))
        expected = expected - advantages[row] * pessimistic.exp().prod() ** (1 / length) / 4
    torch.testing.assert_close(actual, expected, **closely)
    gradients = [torch.autograd.grad(loss, logp)[0] for loss in (actual, expected)]
    torch.testing.assert_close(*gradients, **closely)
    assert 3 < (gradients[0] != 0).sum() < 15


def test_gmpo_within_its_bounds_is_gspo_within_its_own() -> None:
    old_logp, mask = doubles(3, 4, seed=1), prefix_mask([4, 2, 3], 4)
    logp, advantages = old_logp + 0.1 * doubles(3, 4, seed=2).tanh(), doubles(3, 1, seed=3)
    bounds = {"clip_ratio_low": 0.9, "clip_ratio_high": 0.9}
    ours, theirs = (f(logp, old_logp, advantages, mask, **bounds).loss for f in (gmpo_surrogate, gspo_surrogate))
    torch.testing.assert_close(ours, theirs, **closely)


# DPPO.

# π_old, π, A, loss, flag; ε_low = 0.1, ε_high = 0.2
DPPO_CASES = [
    (0.5, 0.5, 2.0, -2.0, ""),
    (0.5, 0.69, 1.0, -1.38, ""),
    (0.5, 0.71, 1.0, 0.0, "high"),
    (0.5, 0.71, -1.0, 1.42, ""),  # in the other direction than the advantage
    (0.5, 0.41, -1.0, 0.82, ""),
    (0.5, 0.39, -1.0, 0.0, "low"),
    (0.5, 0.1, 1.0, -0.2, ""),
    (0.001, 0.1, 1.0, -100.0, ""),  # an unlikely token may change by a factor
    (0.5, 0.9, 0.0, 0.0, ""),
]


@pytest.mark.parametrize(("old", "new", "advantage", "loss", "flag"), DPPO_CASES)
def test_dppo_leaves_out_tokens_whose_probability_has_moved_too_far(
    old: float, new: float, advantage: float, loss: float, flag: str
) -> None:
    logp = f64([new]).log().requires_grad_()
    bounds = {"clip_ratio_low": 0.1, "clip_ratio_high": 0.2}
    result = dppo_surrogate(logp, f64([old]).log(), f64([advantage]), **bounds)
    assert result.loss.item() == pytest.approx(loss, rel=1e-12)
    assert (result.clipped_low.item(), result.clipped_high.item()) == (flag == "low", flag == "high")
    (gradient,) = torch.autograd.grad(result.loss.sum(), logp)
    assert gradient.item() == pytest.approx(loss, rel=1e-12), "of −rA with respect to log π, or 0"


# SAPO.


@pytest.mark.parametrize(("ratio", "advantage"), [(1.0, 2.0), (1.5, 1.0), (0.5, 1.0), (3.0, -2.0), (0.2, -0.5)])
def test_sapo_is_its_formula_and_its_gate_the_factor_of_the_gradient(ratio: float, advantage: float) -> None:
    temperature = 1.0 if advantage > 0 else 1.05
    soft = 1 / (1 + math.exp(-temperature * (ratio - 1)))
    logp = f64([math.log(ratio) - 3]).requires_grad_()
    result = sapo_surrogate(logp, f64([-3]), f64([advantage]))
    assert result.loss.item() == pytest.approx(-4 / temperature * soft * advantage, rel=1e-12)
    gate = 4 * soft * (1 - soft)
    assert result.gate.item() == pytest.approx(gate, rel=1e-12)
    (gradient,) = torch.autograd.grad(result.loss.sum(), logp)
    assert gradient.item() == pytest.approx(-advantage * ratio * gate, rel=1e-12)
    assert (gate == 1) == (ratio == 1)


def test_sapo_fades_sooner_at_a_larger_temperature() -> None:
    logp, old_logp, advantages = f64([0, 0]), f64([-1, -1]), f64([1, -1])
    result = sapo_surrogate(logp, old_logp, advantages, positive_temperature=1.0, negative_temperature=2.0)
    assert result.gate[0, 0] > result.gate[0, 1] > 0


# All of them.


@pytest.mark.parametrize("surrogate", SURROGATES)
def test_the_gradient_passes_gradcheck_away_from_the_bounds(surrogate: Any) -> None:
    """GMPO's and DPPO's flags do not change within the check's steps of 1e-6."""
    mask, advantages = prefix_mask([3, 2], 3), f64([0.7], [-1.3])
    old_logp = -doubles(2, 3, seed=1).abs() - 0.2
    logp = (old_logp + 0.6 * doubles(2, 3, seed=2)).requires_grad_()
    if surrogate is gmpo:  # in its token form the value of a token's loss depends on the others without a gradient

        def of_rows(values: Tensor) -> Tensor:
            return (gmpo(values, old_logp, advantages, mask) / mask.sum(1, keepdim=True)).sum()

        (gradient,) = torch.autograd.grad(of_rows(logp), logp)
        for place in range(6):
            step = torch.zeros(6, dtype=torch.float64)
            step[place] = 1e-6
            ends = [of_rows(logp.detach() + sign * step.view(2, 3)) for sign in (1, -1)]
            assert gradient.flatten()[place].item() == pytest.approx(((ends[0] - ends[1]) / 2e-6).item(), abs=1e-8)
        return
    assert gradcheck(lambda values: surrogate(values, old_logp, advantages, mask), logp)


@pytest.mark.parametrize("surrogate", SURROGATES)
def test_on_policy_the_gradient_is_the_policy_gradient(surrogate: Any) -> None:
    logp, advantages, mask = (-doubles(2, 3).abs()).requires_grad_(), f64([1.5], [-2]), torch.ones(2, 3)
    (gradient,) = torch.autograd.grad(surrogate(logp, logp.detach(), advantages, mask).sum(), logp)
    torch.testing.assert_close(gradient, -advantages.expand(2, 3), **closely)


@pytest.mark.parametrize("advantage", [1.0, -1.0, 0.0])
@pytest.mark.parametrize(("new", "old"), [(-1e4, -1.0), (-INF, -1.0), (-1.0, -1e4), (-1.0, -INF), (-INF, -INF)])
@pytest.mark.parametrize("surrogate", SURROGATES)
def test_impossible_tokens_leave_loss_and_gradient_finite(
    surrogate: Any, new: float, old: float, advantage: float
) -> None:
    logp, old_logp = torch.tensor([[new, -1.0]], requires_grad=True), torch.tensor([[old, -1.0]])
    loss = surrogate(logp, old_logp, torch.tensor([[advantage]]), torch.ones(1, 2))
    (gradient,) = torch.autograd.grad(loss.sum(), logp)
    assert loss.isfinite().all()
    assert gradient.isfinite().all()
    if not advantage:
        assert not loss.any()
        assert not gradient.any()


@pytest.mark.parametrize("name", LOSSES)
@quick
@given(st.lists(st.integers(0, 5), min_size=1, max_size=5), st.data())
def test_a_tokens_loss_depends_on_neither_order_nor_padding_nor_the_other_rows(
    name: Any, lengths: list[int], data: st.DataObject
) -> None:
    """Nor is anything else returned for a token: flags, gates."""
    rows = len(lengths)
    mask, order = prefix_mask(lengths, 5), torch.tensor(data.draw(st.permutations(range(rows))))
    logp, old_logp, advantages = doubles(rows, 5), doubles(rows, 5, seed=1), doubles(rows, 1, seed=2).expand(rows, 5)

    def tokens_of(logp: Tensor, old_logp: Tensor, advantages: Tensor, mask: Tensor) -> list[Tensor]:
        loss, metrics = loss_class(name)().surrogate(TokenStats(logp, None, old_logp, None, advantages, mask))
        return [torch.where(mask, values.double(), 0.0) for values in (loss, *metrics.values())]

    whole = tokens_of(logp, old_logp, advantages, mask)
    part = order[: data.draw(st.integers(1, rows))]
    for found, values in zip(tokens_of(*(x[part] for x in (logp, old_logp, advantages, mask))), whole, strict=True):
        torch.testing.assert_close(found, values[part], **closely)
    wider = [torch.nn.functional.pad(torch.where(mask, x, NAN), (0, 2), value=NAN) for x in (logp, old_logp)]
    further = torch.nn.functional.pad(advantages, (0, 2)), torch.nn.functional.pad(mask, (0, 2))
    for found, values in zip(tokens_of(*wider, *further), whole, strict=True):
        torch.testing.assert_close(found[:, :5], values, **closely)


@quick
@given(st.lists(st.integers(0, 5), min_size=1, max_size=5), st.data())
def test_gmpo_is_zero_on_padding(lengths: list[int], data: st.DataObject) -> None:
    rows = len(lengths)
    mask, order = prefix_mask(lengths, 5), torch.tensor(data.draw(st.permutations(range(rows))))
    inputs = [doubles(rows, 5), doubles(rows, 5, seed=1), doubles(rows, 1, seed=2)]
    whole = gmpo(*inputs, mask)
    torch.testing.assert_close(gmpo(*(x[order] for x in inputs), mask[order]), whole[order], **closely)
    wider = [torch.nn.functional.pad(torch.where(mask, x, NAN), (0, 2), value=NAN) for x in inputs[:2]]
    padded = gmpo(*wider, inputs[2], torch.nn.functional.pad(mask.int(), (0, 2)))
    torch.testing.assert_close(padded[:, :5], whole, **closely)
    assert (padded[:, 5:] == 0).all()


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.inf, math.nan])
@pytest.mark.parametrize("name", ["positive_temperature", "negative_temperature"])
def test_sapo_refuses_temperatures_that_are_not_positive(name: str, temperature: float) -> None:
    with pytest.raises(ValueError, match=f"{name} must be a positive number, got"):
        sapo_surrogate(f64([0.0]), f64([0.0]), f64([1.0]), **{name: temperature})


# The losses that recipes name.


def test_every_loss_has_a_name_and_each_is_another() -> None:
    logp, old_logp, advantages = -doubles(2, 4).abs(), -doubles(2, 4, seed=1).abs(), f64([1.0], [-1.0]).expand(2, 4)
    stats = TokenStats(logp, None, old_logp, None, advantages, torch.ones(2, 4, dtype=torch.bool))
    sums = {name: loss_class(name)().surrogate(stats)[0].sum().item() for name in LOSSES}
    assert len({round(value, 6) for value in sums.values()}) == 6, sums


@pytest.mark.parametrize("kind", [GMPOLoss, DPPOLoss, SAPOLoss])
def test_a_dual_clip_is_refused_where_there_is_none(kind: type[PolicyLoss]) -> None:
    kind(dual_clip=None)
    with pytest.raises(ConfigError, match=f"{kind.__name__} has no dual clip: leave it out") as refused:
        kind(dual_clip=3.0)
    assert refused.value.setting == "dual_clip"


@pytest.mark.parametrize("setting", ["clip_ratio_low", "clip_ratio_high"])
@pytest.mark.parametrize("ratio", [0.1, Linear(0.1, 0.2, 3)])
def test_clip_ratios_are_refused_where_nothing_reads_them(setting: str, ratio: Any) -> None:
    with pytest.raises(ConfigError, match="SAPOLoss has no clip ratios: leave it out") as refused:
        SAPOLoss(**{setting: ratio})
    assert refused.value.setting == setting
    SAPOLoss(clip_ratio_low=0.2, clip_ratio_high=0.28)  # the modules pass their defaults


def test_a_subclass_of_sapo_has_temperatures_of_its_own() -> None:
    class Sharper(SAPOLoss):
        positive_temperature = 3.0

    logp, zeros = f64([0.5]), f64([0.0])
    stats = TokenStats(logp, None, zeros, None, f64([1.0]), torch.ones(1, 1, dtype=torch.bool))
    expected = sapo_surrogate(logp, zeros, f64([1.0]), positive_temperature=3.0)
    loss, metrics = Sharper().surrogate(stats)
    torch.testing.assert_close(loss, expected.loss)
    torch.testing.assert_close(metrics["update/gate"], expected.gate)
    assert Sharper.zero_without_advantage
