"""What a functional of the head must return, and what it may do: of one's own, and ours with wrong inputs."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from helpers.models import qwen2
from ibro_lightning.batches.sequences import Sequences
from ibro_lightning.errors import ConfigError, HookError
from ibro_lightning.functional import (
    Collision,
    HeadFunctional,
    KLToHead,
    KLToLogits,
    Margin,
    TokenProbability,
    linear_head,
    products,
)
from ibro_lightning.functional.functional_calls import on_logits
from ibro_lightning.models import Policy
from ibro_lightning.models.transformer import scatter_rows

F64 = torch.float64
N, V, D = 7, 11, 5


def drawn(*shape: int, dtype: torch.dtype = F64, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64).to(dtype)


def head(
    functional: Any, dtype: torch.dtype = F64, n: int = N, v: int = V
) -> tuple[Tensor, tuple[Tensor, Tensor], Tensor]:
    """``(hidden, weight), values`` of the fused head with this functional."""
    hidden, weight = drawn(n, D, dtype=dtype).requires_grad_(), drawn(v, D, dtype=dtype, seed=1).requires_grad_()
    targets = torch.zeros(n, dtype=torch.int64)
    logp, _, values = linear_head(hidden, weight, targets, {"mine": functional}, chunk_size=3)
    return logp, (hidden, weight), values["mine"]


def fused(functional: Any) -> Tensor:
    return head(functional)[2]


def whole(functional: Any) -> Tensor:
    """As of a model without a linear head."""
    return on_logits({"mine": functional}, drawn(N, V).requires_grad_())["mine"]


class Mine(HeadFunctional):
    def __init__(self, function: Callable[[Tensor], Any]) -> None:
        self.function = function

    def value(self, logits: Tensor, rows: slice) -> Any:
        return self.function(logits)


PATHS = [fused, whole]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    ("function", "returned"),
    [
        (lambda z: z.softmax(dim=1), r"float64 \[\d, 11\]"),
        (lambda z: z.argmax(dim=1), r"int64 \[\d\]"),
        (lambda z: z.amax(dim=1) > 0, r"bool \[\d\]"),
        (lambda z: z.mean(), r"float64 \[\]"),
        (lambda z: z.amax(dim=1, keepdim=True), r"float64 \[\d, 1\]"),
        (lambda z: tuple(z.topk(2, dim=1)), r"\(float64 \[\d, 2\], int64 \[\d, 2\]\)"),
        (lambda z: z.amax(dim=1).tolist(), r"a list|\["),
        (lambda z: None, "None"),
    ],
)
def test_a_value_that_is_not_one_number_per_row_is_refused(path: Any, function: Any, returned: str) -> None:
    with pytest.raises(HookError, match=rf"^Mine\.value returned {returned}.* - return \[n\], one number per row"):
        path(Mine(function))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("function", [lambda z: z.detach().amax(dim=1), lambda z: torch.ones(len(z), dtype=F64) * 2])
def test_a_value_without_derivatives_is_refused_when_they_are_needed(path: Any, function: Any) -> None:
    values = path(Mine(function))
    with pytest.raises(HookError, match=r"^Mine\.value returned float64 \[\d\] - autograd finds no derivatives"):
        values.sum().backward()


class Returns(HeadFunctional):
    """The largest logit, with a gradient and further tensors of one's own."""

    def __init__(self, gradient: Any = None, found: Any = None) -> None:
        self.of_gradient, self.found = gradient, found

    def value(self, logits: Tensor, rows: slice) -> Tensor:
        return logits.detach().amax(dim=1)

    def forward(self, logits: Tensor, rows: slice) -> Any:
        return (self.value(logits, rows), logits.argmax(dim=1)) if self.found is None else self.found(logits)

    def gradient(self, logits: Tensor, rows: slice, grad: Tensor, *saved: Tensor) -> Any:
        one_hot = torch.zeros_like(logits).scatter_(1, saved[1].unsqueeze(1), grad.unsqueeze(1))
        return one_hot if self.of_gradient is None else self.of_gradient(one_hot)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    "gradient", [lambda g: g[0], lambda g: g.sum(dim=1, keepdim=True), lambda g: None, lambda g: g.bool()]
)
def test_a_gradient_that_would_be_broadcast_is_refused(path: Any, gradient: Any) -> None:
    values = path(Returns(gradient))
    with pytest.raises(HookError, match=r"^Returns\.gradient returned .* - return \[n, V\], one number per logit"):
        values.sum().backward()


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    "found",
    [
        lambda z: z.amax(dim=1),
        lambda z: (),
        lambda z: (z.amax(dim=1), None),
        lambda z: (z.amax(dim=1), z.sum()),
        lambda z: (z.argmax(dim=1),),
    ],
)
def test_a_forward_that_is_no_tuple_of_rows_is_refused(path: Any, found: Any) -> None:
    with pytest.raises(HookError, match=r"^Returns\.forward returned "):
        path(Returns(found=found))


def test_on_whole_logits_an_own_gradient_counts_as_in_the_fused_head() -> None:
    logits = drawn(N, V).requires_grad_()
    values = on_logits({"mine": Returns()}, logits)["mine"]
    expected = torch.autograd.grad(logits.amax(dim=1).sum(), logits)
    assert torch.equal(values, logits.amax(dim=1))
    assert torch.equal(torch.autograd.grad(values.sum(), logits)[0], expected[0])


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("functional", [Collision, lambda logits, rows: logits.amax(dim=1), None])
def test_what_is_no_functional_is_refused_by_name(path: Any, functional: Any) -> None:
    with pytest.raises(ConfigError, match=r"^functionals\['mine'\]: .* - write an instance of HeadFunctional"):
        path(functional)


def test_a_list_of_functionals_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"^functionals: .* - write an instance of Mapping"):
        linear_head(drawn(N, D), drawn(V, D), torch.zeros(N, dtype=torch.int64), [Collision()])  # type: ignore[arg-type]


def test_values_that_are_not_one_per_token_do_not_fill_a_batch() -> None:
    with pytest.raises(ValueError, match=r"^values must be \[N\], one per response token, got \[3, 4\]"):
        scatter_rows(torch.zeros(3, 4), torch.ones(1, 3, dtype=torch.bool))


# Functionals compute in the precision of the caller, whatever the head does for its own products.


def setting() -> str:
    return str(torch.backends.mkldnn.matmul.fp32_precision)  # type: ignore[attr-defined]


class SeesTheSetting(HeadFunctional):
    def __init__(self) -> None:
        self.seen: list[tuple[str, bool]] = []

    def value(self, logits: Tensor, rows: slice) -> Tensor:
        self.seen.append((setting(), torch.is_autocast_enabled("cpu")))
        return logits.amax(dim=1)


@pytest.mark.parametrize("autocast", [False, True])
def test_float32_products_of_a_functional_are_not_rounded_to_bfloat16(autocast: bool) -> None:
    """With bfloat16 instructions, the setting for the head's own products would round any other product, too."""
    functional, before = SeesTheSetting(), setting()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        _, _, values = head(functional, torch.bfloat16)
        values.sum().backward()
    assert functional.seen == [(before, False)] * 6  # three chunks, forward and backward
    assert setting() == before


class Nested(HeadFunctional):
    """The log-prob of token 0 under a head of its own: a product of bfloat16 values within a functional."""

    def __init__(self) -> None:
        self.weight = drawn(V, V, dtype=torch.bfloat16, seed=2)

    def value(self, logits: Tensor, rows: slice) -> Tensor:
        assert setting() != "bf16"
        targets = torch.zeros(len(logits), dtype=torch.int64)
        return linear_head(logits.to(torch.bfloat16), self.weight, targets, with_entropy=False)[0]


def test_a_functional_may_call_the_head_itself() -> None:
    _, leaves, values = head(Nested(), torch.bfloat16)
    hidden, weight = (leaf.detach().to(F64) for leaf in leaves)
    expected = ((hidden @ weight.T) @ Nested().weight.to(F64).T).log_softmax(dim=1)[:, 0]
    assert torch.allclose(values.to(F64), expected, atol=0.1)
    assert all(g.isfinite().all() for g in torch.autograd.grad(values.sum(), leaves))


def test_a_product_within_a_product_waits_for_nothing() -> None:
    """In a thread of its own, so that a lock that it cannot take twice shows as a thread that does not end."""
    cpu, inner = torch.device("cpu"), list[str]()

    def nested() -> None:
        with products.exact_products(cpu, torch.bfloat16), products.exact_products(cpu, torch.bfloat16):
            inner.append(setting())

    before, thread = setting(), threading.Thread(target=nested, daemon=True)
    assert products._precision_lock.acquire(blocking=False)
    assert products._precision_lock.acquire(blocking=False), "it would wait for itself"
    products._precision_lock.release()
    products._precision_lock.release()
    thread.start()
    thread.join()
    assert inner == ["bf16"]
    assert setting() == before


# Functionals of ours with what does not belong to the head.


def test_a_token_outside_the_vocabulary_is_refused() -> None:
    with pytest.raises(ConfigError, match=rf"^token_ids: 9999 - write ids below {V}, the size of the vocabulary"):
        fused(TokenProbability([3, 9999]))
    with pytest.raises(ConfigError, match=r"^token_ids: 9999"):
        whole(TokenProbability([9999]))


@pytest.mark.parametrize("ids", [[1.5], ["1"], [True], 3, None, "ab"])
def test_token_ids_are_whole_numbers_in_a_list(ids: Any) -> None:
    with pytest.raises(ConfigError, match=r"^token_ids: .* - write different token ids"):
        TokenProbability(ids)


def test_a_margin_needs_two_tokens() -> None:
    with pytest.raises(ConfigError, match=r"^functionals: 'Margin' - it needs a vocabulary of two tokens"):
        head(Margin(), v=1)


@pytest.mark.parametrize(("rows", "vocabulary", "name"), [(9, V, "hidden"), (1, V, "hidden"), (N, 1, "weight")])
def test_a_kl_to_another_number_of_rows_or_tokens_is_refused(rows: int, vocabulary: int, name: str) -> None:
    """More rows were cut, and one row or one token was broadcast."""
    there = rf"\[{rows}, 3\]" if name == "hidden" else rf"\[{vocabulary}, 3\]"
    with pytest.raises(ConfigError, match=rf"^{name}: {there} - this head has"):
        fused(KLToHead(drawn(rows, 3), drawn(vocabulary, 3)))
    with pytest.raises(ConfigError, match=rf"^logits: \[{rows}, {vocabulary}\] - this head has"):
        fused(KLToLogits(drawn(rows, vocabulary)))


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("hidden", {"hidden": torch.zeros(N)}),
        ("hidden", {"hidden": torch.zeros(N, 3, dtype=torch.int64)}),
        ("weight", {"weight": torch.zeros(V, 4)}),
        ("bias", {"bias": torch.zeros(1)}),
        ("bias", {"bias": 0.0}),
        ("temperature", {"temperature": "1"}),
        ("temperature", {"temperature": 0}),
        ("temperature", {"temperature": torch.inf}),
        ("reverse", {"reverse": "forward"}),
    ],
)
def test_a_kl_to_a_head_checks_what_it_is_given(name: str, settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=rf"^{name}: "):
        KLToHead(**{"hidden": torch.zeros(N, 3), "weight": torch.zeros(V, 3), **settings})


def test_a_kl_to_logits_checks_what_it_is_given() -> None:
    with pytest.raises(ConfigError, match=r"^logits: 'float32 \[7\]'"):
        KLToLogits(torch.zeros(N))
    with pytest.raises(ConfigError, match=r"^reverse: "):
        KLToLogits(torch.zeros(N, V), reverse="forward")  # type: ignore[arg-type]


class CountsConversions(torch.overrides.TorchFunctionMode):
    """How often a tensor of this shape is converted to another dtype."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.shape, self.count = shape, 0

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        converts = function is torch.Tensor.to and result.shape == self.shape and result.dtype != args[0].dtype
        self.count += converts
        return result


def test_the_other_heads_weight_is_converted_once() -> None:
    other = KLToHead(drawn(N, 3, dtype=torch.bfloat16), drawn(V, 3, dtype=torch.bfloat16, seed=3))
    with CountsConversions((V, 3)) as conversions:
        _, _, values = head(other, torch.bfloat16)
        values.sum().backward()
    assert conversions.count == 1


def test_a_kl_to_a_float32_head_is_as_exact_with_a_bfloat16_policy() -> None:
    """The other head's float32 products keep their precision, on any CPU."""
    n, v, d = 40, 300, 64
    other, other_weight = drawn(n, d, dtype=torch.float32, seed=5), drawn(v, d, dtype=torch.float32, seed=6)
    hidden, weight = drawn(n, d, dtype=torch.bfloat16), drawn(v, d, dtype=torch.bfloat16, seed=1)
    targets = torch.zeros(n, dtype=torch.int64)
    _, _, found = linear_head(hidden, weight, targets, {"kl": KLToHead(other, other_weight)})
    logp = (hidden.to(F64) @ weight.to(F64).T).log_softmax(dim=1)
    logr = (other.to(F64) @ other_weight.to(F64).T).log_softmax(dim=1)
    expected = (logp.exp() * (logp - logr)).sum(dim=1)
    assert (found["kl"].to(F64) - expected).abs().max() < 1e-4


@pytest.mark.parametrize("fused_head", [True, False])
def test_a_policy_refuses_them_too(fused_head: bool) -> None:
    policy = Policy(qwen2().double(), fused_head=fused_head)
    sequences = Sequences.collate([[1, 2], [3]], [[4, 5, 6], [7]])
    for functional, error in (
        (Mine(lambda z: z.softmax(dim=1)), HookError),
        (TokenProbability([10**6]), ConfigError),
        (KLToLogits(torch.zeros(3, 5)), ConfigError),
    ):
        with pytest.raises(error):
            policy(sequences, temperature=1.0, functionals={"mine": functional})
