"""The output layer without full logits against the naive formula on full logits, in float64."""

from __future__ import annotations

import os
import shutil
import warnings
from collections.abc import Iterable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ibro_lightning.functional import fused_head, logprob_and_entropy
from ibro_lightning.functional.fused_head import linear_logprob_entropy

torch.set_num_threads(1)
Inputs = tuple[Any, ...]  # hidden, weight, bias, targets
F64 = torch.float64


def inputs(n: int = 23, d: int = 6, v: int = 63, dtype: torch.dtype = F64, scale: float = 1.0, seed: int = 0) -> Inputs:
    draw = torch.Generator().manual_seed(seed)
    hidden, weight, bias = (torch.randn(*s, generator=draw, dtype=F64) for s in ((n, d), (v, d), (v,)))
    hidden, weight, bias = (x.to(dtype).requires_grad_() for x in (hidden * scale, weight, bias))
    return hidden, weight, bias, torch.randint(v, (n,), generator=draw)


def upstream(n: int, seed: int = 1) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(n, generator=draw, dtype=F64), torch.randn(n, generator=draw, dtype=F64)


def fused(of: Inputs, g: Any = None, **options: Any) -> list[Any]:
    """Outputs, then gradients in hidden, weight and bias, from ``g`` arriving at the outputs."""
    hidden, weight, bias, targets = of
    outputs = linear_logprob_entropy(hidden, weight, targets, bias=bias, **options)
    return [*outputs, *gradients(outputs, of, g)]


def naive(of: Inputs, g: Any = None, temperature: float = 1.0) -> list[Any]:
    """The same in float64 whatever the inputs are."""
    hidden, weight, bias = (x.detach().to(F64).requires_grad_() for x in of[:3])
    outputs = logprob_and_entropy(hidden @ weight.T + bias, of[3], temperature=temperature)
    return [*outputs, *gradients(outputs, (hidden, weight, bias, of[3]), g)]


def gradients(outputs: Any, of: Inputs, g: Any) -> tuple[Tensor, ...]:
    pairs = [
        (x, u.to(x)) for x, u in zip(outputs, g or upstream(len(of[3])), strict=True) if u is not None and x is not None
    ]
    return torch.autograd.grad([x for x, _ in pairs], of[:3], [u for _, u in pairs])


def relative_error(got: Tensor, expected: Tensor) -> float:
    """Of the whole tensor: norm of the difference over norm."""
    return float((got.to(F64) - expected).norm() / expected.norm())


def assert_all_close(got: Iterable[Any], expected: Iterable[Any], atol: float = 1e-12) -> None:
    for x, y in zip(got, expected, strict=True):
        torch.testing.assert_close(x, y, atol=atol, rtol=0)


# Against the naive formula, in float64.


@pytest.mark.parametrize("v", [1, 2, 63, 127, 1000, 5003])
def test_values_and_gradients_are_those_of_full_logits(v: int) -> None:
    of = inputs(v=v)
    assert_all_close(fused(of, chunk_size=5), naive(of))


def test_a_vocabulary_the_size_of_gpt2s_adds_no_probability_mass_at_its_end() -> None:
    of = inputs(n=3, d=2, v=50257)
    assert_all_close(fused(of), naive(of))


@pytest.mark.parametrize("temperature", [0.3, 1.7])
def test_temperature_divides_the_logits_and_their_gradients(temperature: float) -> None:
    of = inputs()
    assert_all_close(fused(of, temperature=temperature, chunk_size=7), naive(of, temperature=temperature), atol=1e-11)


@pytest.mark.parametrize("chunk_size", [1, 3, 7, 23, 1000, None])
@pytest.mark.parametrize("block_bytes", [1, 2 * 63 * 8, 1 << 20])
def test_chunks_and_blocks_do_not_show(
    chunk_size: int | None, block_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fused_head, "_CPU_BLOCK_BYTES", block_bytes)
    of = inputs()
    assert_all_close(fused(of, chunk_size=chunk_size), naive(of))


def test_gradients_are_derivatives() -> None:
    hidden, weight, bias, targets = inputs(n=4, d=3, v=5)

    def outputs(hidden: Tensor, weight: Tensor, bias: Tensor) -> Any:
        return linear_logprob_entropy(hidden, weight, targets, bias=bias, temperature=0.8, chunk_size=3)

    assert gradcheck(outputs, (hidden, weight, bias))


@pytest.mark.parametrize("arriving", [(True, False), (False, True), (True, True)])
def test_a_gradient_may_arrive_for_one_output_only(arriving: tuple[bool, bool]) -> None:
    of = inputs()
    g = tuple(u if there else None for u, there in zip(upstream(23), arriving, strict=True))
    assert_all_close(fused(of, g, chunk_size=7), naive(of, g))


def test_without_entropy_only_the_logprob_is_returned() -> None:
    of, g = inputs(), (upstream(23)[0], None)
    logp, entropy, *grads = fused(of, g, chunk_size=7, with_entropy=False)
    assert entropy is None
    expected = naive(of, g)
    assert_all_close([logp, *grads], [expected[0], *expected[2:]])


def test_rows_without_gradient_have_none_and_add_none() -> None:
    """As rows of padding have."""
    of, g = inputs(), [u * (torch.arange(23) % 2) for u in upstream(23)]
    got = fused(of, g, chunk_size=7)
    assert_all_close(got, naive(of, g))
    assert not got[2][::2].any()


def test_the_order_of_the_rows_does_not_matter() -> None:
    hidden, weight, bias, targets = of = inputs()
    order, g = torch.randperm(23, generator=torch.Generator().manual_seed(2)), upstream(23)
    logp, entropy, of_hidden, of_weight, of_bias = fused(of, chunk_size=7)
    permuted = (hidden.detach()[order].requires_grad_(), weight, bias, targets[order])
    got = fused(permuted, (g[0][order], g[1][order]), chunk_size=7)
    assert_all_close(got, [logp[order], entropy[order], of_hidden[order], of_weight, of_bias])


@pytest.mark.parametrize("frozen", [{0}, {1}, {2}, {0, 2}, {1, 2}, {0, 1}])
def test_frozen_inputs_get_no_gradient_and_change_no_other(frozen: set[int]) -> None:
    of, expected = inputs(), naive(inputs())[2:]
    for i in frozen:
        of[i].requires_grad_(False)
    hidden, weight, bias, targets = of
    outputs: Any = linear_logprob_entropy(hidden, weight, targets, bias=bias, chunk_size=7)
    torch.autograd.backward(outputs, upstream(23))
    for i in range(3):
        if i in frozen:
            assert of[i].grad is None
        else:
            torch.testing.assert_close(of[i].grad, expected[i], atol=1e-12, rtol=0)


def test_bias_may_be_left_out() -> None:
    hidden, weight, bias, targets = inputs()
    variants = []
    for zero in (None, torch.zeros_like(bias)):
        outputs: Any = linear_logprob_entropy(hidden, weight, targets, bias=zero, chunk_size=7)
        variants.append([*outputs, *torch.autograd.grad(outputs, (hidden, weight), upstream(23))])
    assert_all_close(variants[0], variants[1])


@pytest.mark.parametrize("n", [0, 1])
@pytest.mark.parametrize("with_entropy", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_row_and_one_row(n: int, with_entropy: bool, dtype: torch.dtype) -> None:
    of = inputs(n=n, dtype=dtype)
    logp, entropy, *grads = fused(of, with_entropy=with_entropy)
    assert logp.shape == (n,)
    assert logp.dtype == torch.float32
    assert (entropy is None) != with_entropy
    assert entropy is None or (entropy.shape == (n,) and entropy.dtype == torch.float32)
    for grad, x in zip(grads, of, strict=False):
        assert grad.shape == x.shape
        assert grad.dtype == dtype
        assert bool(grad.any()) == bool(n)


def test_second_derivatives_are_refused() -> None:
    """They would be wrong, not zero."""
    hidden, weight, bias, targets = inputs()
    logp, _ = linear_logprob_entropy(hidden, weight, targets, bias=bias)
    (grad,) = torch.autograd.grad(logp.square().sum(), hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


# Extreme logits.


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, F64])
def test_masked_tokens_have_no_probability_and_spoil_nothing(dtype: torch.dtype) -> None:
    """A bias of −inf over all but the targets and a few more; the naive formula without the masked columns agrees."""
    hidden, weight, _, targets = inputs(dtype=dtype)
    allowed = torch.unique(torch.cat([targets, torch.tensor([0, 5, 62])]))
    bias = torch.full((63,), -torch.inf, dtype=dtype).index_fill(0, allowed, 0.25).requires_grad_()
    got = fused((hidden, weight, bias, targets), chunk_size=7)
    kept = (hidden, weight[allowed], bias[allowed], torch.searchsorted(allowed, targets))
    logp, entropy, of_hidden, of_weight, of_bias = naive(kept)
    atol = {F64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 0.05}[dtype]
    expected = [
        of_hidden,
        *(torch.zeros(63, *x.shape[1:], dtype=F64).index_copy(0, allowed, x) for x in (of_weight, of_bias)),
    ]
    assert_all_close([x.to(F64) for x in got[:2]], [logp, entropy], atol=min(atol, 1e-5))
    assert_all_close([x.to(F64) for x in got[2:]], expected, atol=atol)


def test_a_masked_target_is_impossible_and_its_row_still_has_finite_gradients() -> None:
    hidden, weight, bias, targets = inputs()
    bias = bias.detach().index_fill(0, targets[:1], -torch.inf).requires_grad_()
    logp, entropy, *grads = fused((hidden, weight, bias, targets), chunk_size=7)
    assert logp[0] == -torch.inf
    assert entropy.isfinite().all()
    assert all(grad.isfinite().all() for grad in grads)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_logits_of_ten_thousand_neither_overflow_nor_lose_the_gradient(dtype: torch.dtype) -> None:
    hidden, weight, bias, targets = inputs(dtype=dtype)
    hidden = (hidden.detach() * 2500).requires_grad_()
    of = (hidden, weight, bias, targets)
    assert (hidden.to(F64) @ weight.to(F64).T).abs().max() > 1e4
    got, expected = fused(of, chunk_size=7), naive(of)
    assert all(x.isfinite().all() for x in got)
    torch.testing.assert_close(got[0].to(F64), expected[0], atol=0, rtol=1e-6)
    assert relative_error(got[3], expected[3]) < 10 * torch.finfo(dtype).eps + 1e-3


# Precision.


def test_float32_gradients_are_within_1e_minus_5_of_float64() -> None:
    of = inputs(n=200, d=64, v=2001, dtype=torch.float32)
    got, expected = fused(of, chunk_size=37), naive(of)
    assert_all_close([x.to(F64) for x in got[:2]], expected[:2], atol=5e-5)
    for x, y in zip(got[2:], expected[2:], strict=True):
        assert relative_error(x, y) < 1e-5
        assert float((x - y).abs().max() / y.abs().max()) < 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("d", [64, 600])
def test_of_half_precision_inputs_nothing_is_rounded_but_the_gradients(dtype: torch.dtype, d: int) -> None:
    """Against float64 on the very same rounded inputs."""
    of = inputs(n=64, d=d, v=1001, dtype=dtype, scale=3 / d**0.5)
    got, expected = fused(of, chunk_size=37), naive(of)
    assert [x.dtype for x in got] == [torch.float32] * 2 + [dtype] * 3
    assert_all_close([x.to(F64) for x in got[:2]], expected[:2], atol=2e-5)
    for x, y in zip(got[2:], expected[2:], strict=True):
        assert relative_error(x, y) < torch.finfo(dtype).eps / 2


def test_the_bfloat16_setting_is_restored_even_after_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    setting: Any = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = setting.fp32_precision
    fused(inputs(dtype=torch.bfloat16))
    assert setting.fp32_precision == before
    monkeypatch.setattr(fused_head, "_statistics", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        fused(inputs(dtype=torch.bfloat16))
    assert setting.fp32_precision == before


def test_different_dtypes_are_promoted_and_each_gets_its_gradient_back() -> None:
    hidden, weight, bias, targets = inputs(dtype=torch.float32)
    half = hidden.detach().bfloat16().requires_grad_()
    got, expected = fused((half, weight, bias, targets)), naive((half, weight, bias, targets))
    assert [x.dtype for x in got] == [torch.float32, torch.float32, torch.bfloat16, torch.float32, torch.float32]
    assert_all_close([x.to(F64) for x in got[:2]], expected[:2], atol=1e-5)
    assert relative_error(got[3], expected[3]) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_rounds_the_inputs_but_neither_the_results_nor_the_gradient_dtypes(dtype: torch.dtype) -> None:
    of = inputs(n=64, d=64, v=501, dtype=dtype)
    rounded = (*(x.detach().bfloat16().requires_grad_() for x in of[:3]), of[3])
    with torch.autocast("cpu", torch.bfloat16):
        got = fused(of, chunk_size=37)
    assert [x.dtype for x in got] == [torch.float32] * 2 + [dtype] * 3
    expected = naive(rounded)
    assert_all_close([x.to(F64) for x in got[:2]], expected[:2], atol=2e-5)
    for x, y in zip(got[2:], expected[2:], strict=True):
        assert relative_error(x, y) < torch.finfo(torch.bfloat16).eps / 2


# Memory.


class LargestTensor(TorchDispatchMode):
    """Remembers the most elements that any operation returned."""

    numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.numel = max([self.numel, *(x.numel() for x in tree_leaves(out) if isinstance(x, Tensor))])
        return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_as_large_as_the_logits_ever_exists(dtype: torch.dtype) -> None:
    n, v, chunk_size = 256, 512, 16
    of = inputs(n=n, d=8, v=v, dtype=dtype)
    with LargestTensor() as largest:
        fused(of, chunk_size=chunk_size)
    assert largest.numel == chunk_size * v
    with LargestTensor() as largest:
        logprob_and_entropy(of[0] @ of[1].T, of[3])
    assert largest.numel == n * v


# What a GPU does, on a CPU: half-precision factors with (emulated) float32 products, and compiled arithmetic.


@pytest.fixture
def half_factors(monkeypatch: pytest.MonkeyPatch) -> None:
    def emulated(out: Tensor, a: Tensor, b: Tensor, *, beta: float = 1, alpha: float = 1) -> None:
        assert a.dtype == b.dtype
        out.addmm_(a.to(out.dtype), b.to(out.dtype), beta=beta, alpha=alpha)

    monkeypatch.setattr(fused_head, "factors", lambda hidden, weight: (hidden, weight))
    monkeypatch.setattr(fused_head, "addmm_", emulated)


def assert_nothing_is_lost(dtype: torch.dtype) -> None:
    """But the rounding of dz and of the gradients."""
    of = inputs(n=64, d=64, v=501, dtype=dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # the fall-back to eager arithmetic
        got, expected = fused(of, chunk_size=37), naive(of)
    assert_all_close([x.to(F64) for x in got[:2]], expected[:2], atol=5e-5)
    for x, y in zip(got[2:], expected[2:], strict=True):
        assert relative_error(x, y) < max(torch.finfo(dtype).eps, 1e-5)


@pytest.mark.usefixtures("half_factors")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_factors(dtype: torch.dtype) -> None:
    assert_nothing_is_lost(dtype)


slow = pytest.mark.skipif(
    "SLOW_TESTS" not in os.environ or not shutil.which("g++"), reason="half a minute of C++ compilation: SLOW_TESTS=1"
)


@pytest.mark.usefixtures("half_factors")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=slow)])
def test_compiled_arithmetic(backend: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    arithmetic = (fused_head._statistics, fused_head._logit_gradients)
    compiled = {f: torch.compile(f, dynamic=True, backend=backend) for f in arithmetic}
    monkeypatch.setattr(fused_head, "_compiled", compiled.__getitem__)
    monkeypatch.setattr(fused_head, "_compiled_devices", {"cpu"})
    assert_nothing_is_lost(dtype)
    torch._dynamo.reset()


def test_where_compilation_fails_eager_arithmetic_goes_on_after_one_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(function: Any) -> Any:
        raise RuntimeError("no compiler")

    of, expected = inputs(), naive(inputs())
    monkeypatch.setattr(fused_head, "_compiled_devices", {"cpu"})
    monkeypatch.setattr(fused_head, "_compiled", broken)
    with pytest.warns(UserWarning, match="no compiler"):
        got = fused(of, chunk_size=7)
    assert_all_close(got, expected)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_all_close(fused(of, chunk_size=7), expected)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [F64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("with_entropy", [True, False])
def test_a_gpu_agrees_with_the_cpu(dtype: torch.dtype, with_entropy: bool) -> None:
    of = inputs(n=300, d=64, v=5003, dtype=dtype, scale=0.5)
    there = (*(x.detach().cuda().requires_grad_() for x in of[:3]), of[3].cuda())
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        got = fused(there, chunk_size=128, with_entropy=with_entropy, temperature=0.9)
    expected = fused(of, chunk_size=128, with_entropy=with_entropy, temperature=0.9)
    for x, y in zip(got, expected, strict=True):
        if y is not None:
            assert x.dtype == y.dtype
            assert relative_error(x.cpu(), y.to(F64)) < max(1e-5, torch.finfo(y.dtype).eps)


# Bad input.


@pytest.mark.parametrize(
    ("argument", "bad"),
    [
        ("hidden", {"hidden": torch.zeros(2, 3, 4)}),
        ("hidden", {"hidden": torch.zeros(3, 4, dtype=torch.int64)}),
        ("weight", {"weight": torch.zeros(5, 3)}),
        ("weight", {"weight": torch.zeros(0, 4)}),
        ("weight", {"weight": torch.zeros(4)}),
        ("bias", {"bias": torch.zeros(4)}),
        ("targets", {"targets": torch.tensor([0, 1])}),
        ("targets", {"targets": torch.tensor([0, 1, 5])}),
        ("targets", {"targets": torch.tensor([0, 1, -100])}),
        ("targets", {"targets": torch.tensor([0.0, 1.0, 2.0])}),
        ("temperature", {"temperature": 0.0}),
        ("temperature", {"temperature": float("nan")}),
        ("chunk_size", {"chunk_size": 0}),
    ],
)
def test_bad_arguments_are_named(argument: str, bad: dict[str, Any]) -> None:
    good: dict[str, Any] = {
        "hidden": torch.zeros(3, 4),
        "weight": torch.zeros(5, 4),
        "targets": torch.tensor([0, 1, 4]),
    }
    linear_logprob_entropy(**good)
    with pytest.raises(ValueError, match=f"^{argument} must"):
        linear_logprob_entropy(**{**good, **bad})
