"""Aggregation, whitening and explained variance against numbers worked out by hand, or a second formula in float64."""

from __future__ import annotations

import math
from typing import get_args

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import gradcheck

from ibro_lightning.functional import (
    AggregationMode,
    aggregate,
    aggregation_weights,
    explained_variance,
    masked_whiten,
    token_mean,
)

torch.set_num_threads(1)
quick = settings(max_examples=40, deadline=None)
MODES = get_args(AggregationMode)
every_mode = pytest.mark.parametrize("mode", MODES)
NAN, INF = math.nan, math.inf


def doubles(*shape: int, seed: int = 0, grad: bool = False) -> Tensor:
    values = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return values.requires_grad_(grad)


def f64(*values: object) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def masks(rows: int, columns: int) -> st.SearchStrategy[Tensor]:
    """Any mask, holes and empty rows included."""
    bits = st.lists(st.booleans(), min_size=rows * columns, max_size=rows * columns)
    return bits.map(lambda bits: torch.tensor(bits).reshape(rows, columns))


def counts(mask: Tensor) -> dict[str, Tensor]:
    return {"num_tokens": mask.sum(), "num_sequences": mask.any(1).sum()}


def poisoned(values: Tensor, mask: Tensor, bad: float) -> Tensor:
    return torch.where(mask.bool(), values, bad)


# Aggregation.

VALUES, MASK = f64([1, 2, 3], [6, 100, 100]), torch.tensor([[1, 1, 1], [1, 0, 0]])
BY_HAND = {
    "token-mean": (3.0, [[1 / 4] * 3, [1 / 4, 0, 0]]),  # (1 + 2 + 3 + 6) / 4
    "seq-mean-token-sum": (6.0, [[1 / 2] * 3, [1 / 2, 0, 0]]),  # (6 + 6) / 2
    "seq-mean-token-mean": (4.0, [[1 / 6] * 3, [1 / 2, 0, 0]]),  # (2 + 6) / 2
    "seq-mean-token-sum-norm": (0.6, [[1 / 20] * 3, [1 / 20, 0, 0]]),  # (6 + 6) / 10 / 2
}


@every_mode
def test_aggregate_and_its_weights_by_hand(mode: AggregationMode) -> None:
    total, weights = BY_HAND[mode]
    arguments = {"num_tokens": 4, "num_sequences": 2, "max_tokens": 10}
    torch.testing.assert_close(aggregate(VALUES, MASK, mode, **arguments), torch.tensor(total).double())
    torch.testing.assert_close(aggregation_weights(MASK, mode, **arguments), torch.tensor(weights))


@every_mode
@pytest.mark.parametrize("as_tensor", [False, True])
def test_the_denominators_are_those_of_the_whole_step(mode: AggregationMode, as_tensor: bool) -> None:
    """This micro-batch has half of the step's tokens and a quarter of its sequences."""
    tokens, sequences = (torch.tensor(8), torch.tensor(8)) if as_tensor else (8, 8)
    result = aggregate(VALUES, MASK, mode, num_tokens=tokens, num_sequences=sequences, max_tokens=10)
    assert result.item() == pytest.approx(BY_HAND[mode][0] / (2 if mode == "token-mean" else 4), rel=1e-12)


def test_token_mean_is_the_same_function_under_both_names() -> None:
    assert aggregate(VALUES, MASK, "token-mean", num_tokens=7, num_sequences=1) == token_mean(VALUES, MASK, 7)


def test_the_denominators_may_be_smaller_than_one() -> None:
    """DDP averages gradients over ranks: N of 2 tokens on 4 ranks is passed as 0.5."""
    assert aggregate(f64([3]), torch.ones(1, 1), "token-mean", num_tokens=0.5, num_sequences=0.25).item() == 6.0
    assert aggregate(f64([3]), torch.ones(1, 1), "seq-mean-token-sum", num_tokens=0.5, num_sequences=0.25).item() == 12


def test_max_tokens_matters_to_dr_grpo_only() -> None:
    with pytest.raises(ValueError, match="seq-mean-token-sum-norm needs max_tokens"):
        aggregate(VALUES, MASK, "seq-mean-token-sum-norm", num_tokens=4, num_sequences=2)
    for mode in MODES[:-1]:
        one, other = (aggregate(VALUES, MASK, mode, num_tokens=4, num_sequences=2, max_tokens=n) for n in (None, 10))
        assert one == other


def test_an_unknown_mode_is_answered_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match=f"{', '.join(MODES)}; got 'mean'"):
        aggregation_weights(MASK, "mean", num_tokens=4, num_sequences=2)


@every_mode
@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_padding_is_ignored_in_the_value_and_in_the_gradient(mode: AggregationMode, bad: float) -> None:
    values = poisoned(VALUES, MASK, bad).requires_grad_()
    result = aggregate(values, MASK, mode, num_tokens=4, num_sequences=2, max_tokens=10)
    (grad,) = torch.autograd.grad(result, values)
    total, weights = BY_HAND[mode]
    assert result.item() == pytest.approx(total, rel=1e-12)
    torch.testing.assert_close(grad, f64(*weights))


@every_mode
def test_rows_and_steps_without_tokens_count_as_nothing(mode: AggregationMode) -> None:
    """Their weight would be 1/0, and 0·inf is nan."""
    values = torch.full((2, 3), NAN, requires_grad=True)
    for mask in (torch.zeros(2, 3), torch.zeros(2, 3, dtype=torch.bool)):
        result = aggregate(values, mask, mode, num_tokens=0, num_sequences=0, max_tokens=10)
        assert result.item() == 0.0
        assert torch.autograd.grad(result, values)[0].tolist() == [[0.0] * 3] * 2
    half_empty = aggregation_weights(torch.tensor([[1, 1], [0, 0]]), mode, num_tokens=2, num_sequences=1, max_tokens=4)
    assert half_empty[1].tolist() == [0.0, 0.0]
    assert (half_empty[0] > 0).all()


@every_mode
def test_aggregate_passes_gradcheck(mode: AggregationMode) -> None:
    mask = torch.tensor([[1, 1, 0], [0, 0, 0], [0, 1, 1]])
    arguments = {"num_tokens": 7, "num_sequences": 3, "max_tokens": 5}
    assert gradcheck(lambda x: aggregate(x, mask, mode, **arguments), doubles(3, 3, grad=True))


def test_half_precision_values_are_summed_in_float32() -> None:
    """1/3 in bfloat16 is off by 0.1 %."""
    values, mask = torch.ones(1, 3, dtype=torch.bfloat16), torch.ones(1, 3)
    result = aggregate(values, mask, "token-mean", num_tokens=9, num_sequences=1)
    assert result.dtype == torch.float32
    assert result.item() == pytest.approx(1 / 3, rel=1e-6)


def test_weights_have_the_dtype_asked_for_and_the_device_of_the_mask() -> None:
    mask = torch.ones(2, 3, device="meta")
    weights = aggregation_weights(mask, "token-mean", num_tokens=6, num_sequences=2, dtype=torch.float64)
    assert weights.dtype == torch.float64
    assert weights.device.type == "meta"
    assert aggregation_weights(MASK, "token-mean", num_tokens=6, num_sequences=2).dtype == torch.float32


def by_loops(values: Tensor, mask: Tensor, mode: str, max_tokens: float) -> float:
    rows = [[x for x, m in zip(row, bits, strict=True) if m] for row, bits in zip(values.tolist(), mask, strict=True)]
    rows = [row for row in rows if row]
    tokens, n = [x for row in rows for x in row], max(len(rows), 1)
    return {
        "token-mean": math.fsum(tokens) / max(len(tokens), 1),
        "seq-mean-token-sum": math.fsum(tokens) / n,
        "seq-mean-token-mean": math.fsum(math.fsum(row) / len(row) for row in rows) / n,
        "seq-mean-token-sum-norm": math.fsum(tokens) / n / max_tokens,
    }[mode]


@quick
@given(st.data(), st.sampled_from(MODES))
def test_aggregate_depends_on_neither_cut_order_nor_padding(data: st.DataObject, mode: AggregationMode) -> None:
    mask, values = data.draw(masks(6, 4)), doubles(6, 4)
    part = torch.tensor(data.draw(st.lists(st.integers(0, 3), min_size=6, max_size=6), label="micro-batch of each row"))
    order = torch.tensor(data.draw(st.permutations(range(6))))
    arguments = {**counts(mask), "max_tokens": 9}
    expected = pytest.approx(by_loops(values, mask, mode, 9), rel=1e-12, abs=1e-12)
    in_parts = sum(aggregate(values[part == i], mask[part == i], mode, **arguments) for i in range(4))
    assert in_parts.item() == expected
    assert aggregate(values[order], mask[order], mode, **arguments).item() == expected
    wider = torch.cat([poisoned(values, mask, NAN), torch.full((6, 3), INF)], 1)
    longer = torch.cat([wider, torch.full((2, 7), NAN)])
    padded = torch.nn.functional.pad(mask.int(), (0, 3, 0, 2))
    assert aggregate(longer, padded, mode, **arguments).item() == expected


# Whitening.


def test_whitening_by_hand() -> None:
    """1, 2, 3 have mean 2 and population variance 2/3."""
    whitened = masked_whiten(f64([1, 2, NAN], [3, INF, -INF]), torch.tensor([[1, 1, 0], [1, 0, 0]]), epsilon=0.0)
    torch.testing.assert_close(whitened, f64([-math.sqrt(1.5), 0, 0], [math.sqrt(1.5), 0, 0]), rtol=1e-12, atol=1e-12)


def test_epsilon_is_added_to_the_variance() -> None:
    whitened = masked_whiten(f64(-1, 1), torch.ones(2), epsilon=3.0)
    torch.testing.assert_close(whitened, f64(-0.5, 0.5))
    torch.testing.assert_close(masked_whiten(f64(-1e-4, 1e-4), torch.ones(2)), f64(-math.sqrt(0.5), math.sqrt(0.5)))


def test_a_given_mean_and_variance_are_used() -> None:
    values, mask = f64([5, 7, NAN]), torch.tensor([[1, 1, 0]])
    both = masked_whiten(values, mask, mean=torch.tensor(3.0), variance=4.0, epsilon=0.0)
    torch.testing.assert_close(both, f64([1, 2, 0]))
    only_variance = masked_whiten(values, mask, variance=torch.tensor(4.0), epsilon=0.0)
    torch.testing.assert_close(only_variance, f64([-0.5, 0.5, 0]))
    only_mean = masked_whiten(values, mask, mean=3.0, epsilon=0.0)  # mean of 2² and 4² is 10
    torch.testing.assert_close(only_mean, f64([2, 4, 0]) / math.sqrt(10))


def test_equal_values_whiten_to_zero() -> None:
    """0.1 + 0.1 + 0.1 is not 3·0.1, but the rounding error must stay one."""
    whitened = masked_whiten(torch.full((1, 3), 0.1), torch.ones(1, 3))
    assert whitened.abs().max() < 1e-8


def test_a_large_common_part_does_not_blur_small_differences() -> None:
    """The mean, 10,000 + 4.5/1024, is no float32: rounded to one it would be off by half a step."""
    values = (10_000 + torch.arange(10.0) / 1024)[None]
    expected = (torch.arange(10.0) - 4.5)[None] / math.sqrt(8.25)  # the population variance of 0..9
    torch.testing.assert_close(masked_whiten(values, torch.ones(1, 10), epsilon=0.0), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("given", "expected"), [(torch.bfloat16, torch.bfloat16), (torch.int64, torch.float32)])
def test_whitening_keeps_a_floating_dtype(given: torch.dtype, expected: torch.dtype) -> None:
    whitened = masked_whiten(torch.tensor([-1, 1], dtype=given), torch.ones(2))
    assert whitened.dtype == expected
    assert whitened.tolist() == [-1.0, 1.0]


@pytest.mark.parametrize("shape", [(2, 3), (1, 1), (0, 3), (2, 0)])
def test_whitening_without_valid_tokens_gives_zeros(shape: tuple[int, int]) -> None:
    assert torch.equal(masked_whiten(torch.full(shape, NAN), torch.zeros(shape)), torch.zeros(shape))


def test_one_token_whitens_to_zero() -> None:
    assert masked_whiten(torch.tensor([[7.0]]), torch.ones(1, 1)).item() == 0.0


def test_whitening_passes_gradcheck_and_gives_padding_no_gradient() -> None:
    mask = torch.tensor([[1, 1, 0], [0, 1, 1]])
    assert gradcheck(lambda x: masked_whiten(x, mask), doubles(2, 3, grad=True))
    values = poisoned(doubles(2, 3), mask, NAN).requires_grad_()
    (grad,) = torch.autograd.grad((masked_whiten(values, mask) ** 3).sum(), values)
    assert grad.isfinite().all()
    assert (grad[~mask.bool()] == 0).all()
    assert (grad[mask.bool()] != 0).any()


@quick
@given(st.data(), st.floats(-100, 100), st.floats(0.1, 100))
def test_whitened_values_have_mean_0_and_variance_1(data: st.DataObject, shift: float, scale: float) -> None:
    """Whatever the order, the padding and the cut into ranks that share their mean and variance."""
    mask = data.draw(masks(5, 4).filter(lambda mask: mask.sum() >= 2))
    order = torch.tensor(data.draw(st.permutations(range(5))))
    values = poisoned(scale * doubles(5, 4) + shift, mask, NAN)
    whitened = masked_whiten(values, mask, epsilon=0.0)
    valid = whitened[mask].numpy()
    np.testing.assert_allclose([valid.mean(), valid.var()], [0, 1], atol=1e-9)
    assert (whitened[~mask] == 0).all()
    torch.testing.assert_close(masked_whiten(values[order], mask[order], epsilon=0.0), whitened[order])
    statistics = {"mean": values[mask].mean(), "variance": values[mask].var(correction=0), "epsilon": 0.0}
    parts = [masked_whiten(values[rows], mask[rows], **statistics) for rows in (slice(0, 2), slice(2, 5))]
    torch.testing.assert_close(torch.cat(parts), whitened)


# Explained variance.


def test_explained_variance_by_hand() -> None:
    """Returns 1, 2, 3 have variance 2/3; the errors 0, 0, 1 have variance 2/9."""
    mask = torch.tensor([[1, 1, 1, 0]])
    result = explained_variance(f64([1, 2, 2, NAN]), f64([1, 2, 3, INF]), mask)
    assert result.item() == pytest.approx(2 / 3, rel=1e-12)


def test_explained_variance_of_known_critics() -> None:
    returns, mask = doubles(4, 5), torch.ones(4, 5)
    assert explained_variance(returns, returns, mask).item() == 1.0
    assert explained_variance(returns + 5, returns, mask).item() == pytest.approx(1.0, abs=1e-12)
    assert explained_variance(torch.full_like(returns, 3.0), returns, mask).item() == pytest.approx(0.0, abs=1e-12)
    assert explained_variance(-returns, returns, mask).item() == pytest.approx(-3.0, rel=1e-12)


def test_explained_variance_agrees_with_numpy() -> None:
    values, returns, mask = doubles(6, 5), doubles(6, 5, seed=1), doubles(6, 5, seed=2) > 0
    v, r = values[mask].numpy(), returns[mask].numpy()
    result = explained_variance(poisoned(values, mask, NAN), poisoned(returns, mask, NAN), mask)
    assert result.item() == pytest.approx(1 - (r - v).var() / r.var(), rel=1e-12)


@pytest.mark.parametrize("constant", [0.0, 1.0, 0.1, -1 / 3, 1e6 + 0.1])
@pytest.mark.parametrize("size", [1, 3, 7])
def test_explained_variance_of_equal_returns_is_zero(constant: float, size: int) -> None:
    """Their variance in floating point is not 0: dividing by it would give -1e30."""
    returns = torch.full((2, size), constant, dtype=torch.float64)
    assert explained_variance(doubles(2, size), returns, torch.ones(2, size)).item() == 0.0


@pytest.mark.parametrize("shape", [(2, 3), (0, 3), (2, 0)])
def test_explained_variance_of_nothing_is_zero(shape: tuple[int, int]) -> None:
    nothing = torch.full(shape, NAN)
    result = explained_variance(nothing, nothing, torch.zeros(shape))
    assert result.item() == 0.0
    assert result.dtype == torch.float32


def test_explained_variance_passes_gradcheck_and_gives_padding_no_gradient() -> None:
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]])
    inputs = (doubles(2, 3, grad=True), doubles(2, 3, seed=1, grad=True))
    assert gradcheck(lambda v, r: explained_variance(v, r, mask), inputs)
    values, returns = (poisoned(x.detach(), mask, NAN).requires_grad_() for x in inputs)
    for grad in torch.autograd.grad(explained_variance(values, returns, mask), (values, returns)):
        assert grad.isfinite().all()
        assert grad[0, 2] == 0


@pytest.mark.parametrize(("least", "expected"), [(0.0, 1.0), (1.0, 1.0), (16.0, 0.5)])
def test_a_least_variance_counts_where_it_is_the_larger_one(least: float, expected: float) -> None:
    """The variance of ±2 is 4."""
    whitened = masked_whiten(f64(-2, 2), torch.ones(2), least_variance=least, epsilon=0.0)
    torch.testing.assert_close(whitened, f64(-expected, expected))
