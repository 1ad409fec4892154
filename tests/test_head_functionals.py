"""What a head can tell, chunk by chunk, against the same on full logits in float64; their gradients by gradcheck."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from ibro_lightning.errors import ConfigError
from ibro_lightning.functional import (
    Collision,
    HeadFunctional,
    KLToHead,
    KLToLogits,
    Margin,
    RestrictedEntropy,
    TokenProbability,
    head_functionals,
    linear_head,
    linear_logprob_entropy,
)

F64 = torch.float64
V, D, OTHER = 61, 5, 3
Reference = Callable[[Tensor], Tensor]


class Fourth(HeadFunctional):
    """A user's own: Σ p⁴, which autograd differentiates within a chunk."""

    def value(self, logits: Tensor, rows: slice) -> Tensor:
        return logits.softmax(dim=1).pow(4).sum(dim=1)


def drawn(n: int, scale: float = 1.0, dtype: torch.dtype = F64, seed: int = 0) -> tuple[Tensor, ...]:
    """``hidden [N, D], weight [V, D], bias [V], targets [N]`` and the other head's ``hidden, weight``."""
    generator = torch.Generator().manual_seed(seed)
    shapes = ((n, D), (V, D), (V,), (n, OTHER), (V, OTHER))
    hidden, weight, bias, other, other_weight = (torch.randn(*s, generator=generator, dtype=F64) for s in shapes)
    targets = torch.randint(V, (n,), generator=generator)
    leaves = [x.to(dtype).requires_grad_() for x in (hidden * scale, weight, bias)]
    return *leaves, targets, other.to(dtype), other_weight.to(dtype)


def restricted(logits: Tensor, inside: Tensor) -> Tensor:
    logq = logits.masked_fill(~inside, -1e30).log_softmax(dim=1)
    return -(logq.exp() * logq).sum(dim=1)


def in_top_p(logits: Tensor, share: float) -> Tensor:
    """One row after the other: tokens by falling probability until their sum reaches the share."""
    inside = torch.zeros_like(logits, dtype=torch.bool)
    for row, p in enumerate(logits.softmax(dim=1).detach()):
        total = 0.0
        for token in p.argsort(descending=True).tolist():
            inside[row, token] = True
            total += p[token].item()
            if total >= share:
                break
    return inside


def cases(other: Tensor, other_weight: Tensor) -> dict[str, tuple[HeadFunctional, Reference]]:
    logr = (other.to(F64) @ other_weight.to(F64).T).log_softmax(dim=1)

    def top_fraction(z: Tensor) -> Tensor:
        return restricted(z, z.argsort(dim=1, descending=True).argsort(dim=1) < round(0.7 * V))

    def margin(z: Tensor) -> Tensor:
        first, second = z.softmax(dim=1).topk(2, dim=1).values.unbind(dim=1)
        return first - second

    def reverse(z: Tensor) -> Tensor:
        return (z.softmax(dim=1) * (z.log_softmax(dim=1) - logr)).sum(dim=1)

    def forward(z: Tensor) -> Tensor:
        return (logr.exp() * (logr - z.log_softmax(dim=1))).sum(dim=1)

    return {
        "top p": (RestrictedEntropy(top_p=0.8), lambda z: restricted(z, in_top_p(z, 0.8))),
        "all of it": (RestrictedEntropy(top_p=1.0), lambda z: restricted(z, torch.ones_like(z, dtype=torch.bool))),
        "top fraction": (RestrictedEntropy(top_fraction=0.7), top_fraction),
        "collision": (Collision(), lambda z: z.softmax(dim=1).pow(2).sum(dim=1)),
        "margin": (Margin(), margin),
        "tokens": (TokenProbability([3, 60]), lambda z: z.softmax(dim=1)[:, [3, 60]].sum(dim=1)),
        "reverse": (KLToHead(other, other_weight), reverse),
        "forward": (KLToHead(other, other_weight, reverse=False), forward),
        "reverse, to logits": (KLToLogits(logr), reverse),
        "forward, to logits": (KLToLogits(logr, reverse=False), forward),
        "a user's": (Fourth(), lambda z: z.softmax(dim=1).pow(4).sum(dim=1)),
    }


NAMES = list(cases(torch.zeros(1, OTHER), torch.zeros(V, OTHER)))


def relative(got: Tensor, expected: Tensor) -> float:
    difference = (got.detach().to(F64) - expected.detach()).norm()
    return float(difference / expected.detach().norm().clamp(min=1e-300))


@pytest.mark.parametrize("n", [0, 1, 257])
@pytest.mark.parametrize("name", NAMES)
def test_values_and_gradients_are_those_of_full_logits(name: str, n: int) -> None:
    *leaves, targets, other, other_weight = drawn(n)
    hidden, weight, bias = leaves
    functional, reference = cases(other, other_weight)[name]
    logp, entropy, told = linear_head(
        hidden, weight, targets, {name: functional}, bias=bias, temperature=0.7, chunk_size=100
    )
    expected = reference((hidden @ weight.T + bias) / 0.7)
    plain = linear_logprob_entropy(hidden, weight, targets, bias=bias, temperature=0.7, chunk_size=100)
    assert torch.equal(logp, plain[0])
    assert entropy is not None
    assert plain[1] is not None
    assert torch.equal(entropy, plain[1])
    assert told[name].shape == (n,)
    if n:
        assert relative(told[name], expected) < 1e-12
        upstream = torch.randn(n, dtype=F64, generator=torch.Generator().manual_seed(1))
        ours = torch.autograd.grad(told[name], leaves, upstream, retain_graph=True)
        theirs = torch.autograd.grad(expected, leaves, upstream)
        assert max(relative(a, b) for a, b in zip(ours, theirs, strict=True)) < 1e-10


@pytest.mark.parametrize("first", [1, 2, 7, 60, 61, 1000])
@pytest.mark.parametrize("share", [0.3, 0.8, 1.0])
def test_top_p_is_the_same_however_many_candidates_are_tried_first(
    monkeypatch: pytest.MonkeyPatch, first: int, share: float
) -> None:
    """Also where many tokens tie with the last candidate: logits are multiples of a half."""
    monkeypatch.setattr(head_functionals, "_FIRST_TOP", first)
    logits = (torch.randn(40, V, generator=torch.Generator().manual_seed(8), dtype=F64) * 4).round() / 2
    logits[0], logits[1, 5] = 0.0, 50.0  # all alike, and one alone
    functional, upstream = RestrictedEntropy(top_p=share), torch.linspace(-1, 1, 40, dtype=F64)
    leaf = logits.clone().requires_grad_()
    p = leaf.detach().softmax(dim=1)
    edge = torch.where(in_top_p(logits, share), p, 2.0).amin(dim=1, keepdim=True)
    expected = restricted(leaf, p >= edge)
    found = functional.forward(logits, slice(0, 40))
    assert torch.allclose(found[0], expected, rtol=1e-12, atol=1e-12)
    (gradient,) = torch.autograd.grad(expected, leaf, upstream)
    assert torch.allclose(functional.gradient(logits, slice(0, 40), upstream, *found), gradient, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("count", [1, 5, 300, 2999, 3000])
def test_numpys_selection_is_that_of_topk(dtype: torch.dtype, count: int) -> None:
    logits = torch.randn(3, 3000, generator=torch.Generator().manual_seed(9), dtype=dtype)
    logits[1] = logits[1].round()
    expected = logits.topk(count, dim=1).values
    assert torch.equal(head_functionals._largest(logits, count), expected)
    assert torch.equal(head_functionals._kth_largest(logits, count), expected[:, -1])


@pytest.mark.parametrize("functional", [RestrictedEntropy(top_p=0.8), RestrictedEntropy(top_fraction=0.7)])
@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_what_is_left_out_gets_no_gradient_to_speak_of(functional: RestrictedEntropy, dtype: torch.dtype) -> None:
    """And nothing underflows: a CPU takes twenty times as long for denormal numbers."""
    logits = torch.randn(9, 4000, generator=torch.Generator().manual_seed(10), dtype=dtype) * 3
    entropy, lowest, total = functional.forward(logits, slice(0, 9))
    outside = logits < lowest.unsqueeze(1)
    assert outside.any(dim=1).all()
    gradient = functional.gradient(logits, slice(0, 9), torch.ones(9, dtype=dtype), entropy, lowest, total)
    assert gradient[outside].abs().max() < 1e-34
    exps = head_functionals._inside(logits, lowest, total).exp()
    assert exps.min() >= torch.finfo(dtype).tiny
    assert torch.allclose(exps.sum(dim=1), torch.ones(9, dtype=dtype), rtol=1e-5)


IN_A_RANDOM_DIRECTION = pytest.mark.parametrize("fast_mode", [True, pytest.param(False, marks=pytest.mark.slow)])


@IN_A_RANDOM_DIRECTION
@pytest.mark.parametrize("name", NAMES)
def test_gradcheck_together_with_log_probs_and_entropy(name: str, fast_mode: bool) -> None:
    *leaves, targets, other, other_weight = drawn(4, seed=2)
    functional, _ = cases(other, other_weight)[name]

    def told(hidden: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
        logp, entropy, further = linear_head(hidden, weight, targets, {name: functional}, bias=bias, chunk_size=3)
        assert entropy is not None
        return logp, entropy, further[name]

    assert torch.autograd.gradcheck(told, tuple(leaves), fast_mode=fast_mode)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("scale", [1e-3, 300.0])
def test_flat_and_extreme_logits_give_finite_values_and_gradients(name: str, scale: float) -> None:
    *leaves, targets, other, other_weight = drawn(9, scale=scale, dtype=torch.float32, seed=3)
    hidden, weight, bias = leaves
    functional, reference = cases(other, other_weight)[name]
    _, _, told = linear_head(hidden, weight, targets, {name: functional}, bias=bias)
    expected = reference(hidden.to(F64) @ weight.to(F64).T + bias.to(F64))
    assert torch.allclose(told[name].to(F64), expected, rtol=1e-4, atol=1e-4)
    for gradient in torch.autograd.grad(told[name].sum(), leaves):
        assert gradient.isfinite().all()


@pytest.mark.parametrize("name", NAMES)
def test_half_precision_inputs_are_computed_in_float32(name: str) -> None:
    *leaves, targets, other, other_weight = drawn(40, dtype=torch.bfloat16, seed=4)
    hidden, weight, bias = leaves
    functional, reference = cases(other, other_weight)[name]
    _, _, told = linear_head(hidden, weight, targets, {name: functional}, bias=bias)
    assert told[name].dtype == torch.float32
    expected = reference(hidden.to(F64) @ weight.to(F64).T + bias.to(F64))
    assert relative(told[name], expected) < 1e-4
    gradients = torch.autograd.grad(told[name].sum(), leaves)
    theirs = torch.autograd.grad(expected.sum(), leaves)
    assert max(relative(a, b.to(F64)) for a, b in zip(gradients, theirs, strict=True)) < 0.02


def test_masked_tokens_have_no_part() -> None:
    hidden, weight, bias, targets, other, other_weight = drawn(6, seed=5)
    targets = targets.clamp(max=V - 2)
    masked = torch.cat([bias.detach()[:-1], torch.tensor([-math.inf], dtype=F64)])
    for name, (functional, _) in cases(other, other_weight).items():
        if name in ("reverse", "forward"):
            functional = KLToHead(other, other_weight, masked, reverse=name == "reverse")
        _, _, told = linear_head(hidden, weight, targets, {name: functional}, bias=masked)
        assert told[name].isfinite().all(), name
        assert all(g.isfinite().all() for g in torch.autograd.grad(told[name].sum(), (hidden, weight))), name


def test_several_at_once_are_what_each_is_alone() -> None:
    *leaves, targets, other, other_weight = drawn(50, seed=6)
    hidden, weight, bias = leaves
    functionals = {name: functional for name, (functional, _) in cases(other, other_weight).items()}
    logp, _, told = linear_head(hidden, weight, targets, functionals, bias=bias, chunk_size=17)
    together = torch.autograd.grad(logp.sum() + sum(told.values()).sum(), leaves)  # type: ignore[union-attr]
    alone = [torch.zeros_like(leaf) for leaf in leaves]
    for name, functional in functionals.items():
        one = linear_head(hidden, weight, targets, {name: functional}, bias=bias, chunk_size=23)
        assert torch.allclose(told[name], one[2][name], rtol=1e-13)
        for total, gradient in zip(alone, torch.autograd.grad(one[2][name].sum(), leaves), strict=True):
            total += gradient
    for total, gradient in zip(alone, torch.autograd.grad(logp_of(leaves, targets).sum(), leaves), strict=True):
        total += gradient
    assert max(relative(a, b) for a, b in zip(together, alone, strict=True)) < 1e-11


def logp_of(leaves: list[Tensor], targets: Tensor) -> Tensor:
    hidden, weight, bias = leaves
    return linear_logprob_entropy(hidden, weight, targets, bias=bias)[0]


def test_identities() -> None:
    hidden, weight, bias, targets, *_ = drawn(30, seed=7)
    functionals: dict[str, HeadFunctional] = {
        "whole": RestrictedEntropy(top_p=1.0),
        "itself": KLToHead(hidden, weight, bias),
        "all": TokenProbability(range(V)),
    }
    _, entropy, told = linear_head(hidden, weight, targets, functionals, bias=bias)
    assert torch.allclose(told["whole"], entropy, rtol=1e-12)
    assert told["itself"].abs().max() < 1e-12
    assert torch.allclose(told["all"], torch.ones(30, dtype=F64))


def test_nothing_asked_for_is_the_plain_head() -> None:
    hidden, weight, bias, targets, *_ = drawn(8)
    assert linear_head(hidden, weight, targets, bias=bias)[2] == {}
    logp, entropy, _ = linear_head(hidden, weight, targets, bias=bias, with_entropy=False)
    assert entropy is None
    assert logp.requires_grad


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: RestrictedEntropy(), "top_p: None - write either top_p or top_fraction"),
        (lambda: RestrictedEntropy(top_p=0.5, top_fraction=0.5), "write either"),
        (lambda: RestrictedEntropy(top_p=0.0), "top_p: 0.0 - write a number above 0 and up to 1"),
        (lambda: RestrictedEntropy(top_fraction=1.5), "top_fraction: 1.5 - write a number above 0"),
        (lambda: TokenProbability([]), "token_ids: .* - write different token ids"),
        (lambda: TokenProbability([1, 1]), "token_ids: .* - write different token ids"),
    ],
)
def test_wrong_settings_say_what_to_write(make: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()


def test_a_head_of_another_shape_is_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"^weight: 'float32 \[5, 4\]' - give floating-point \[V, D'\], here \[V, 3\]"
    ):
        KLToHead(torch.zeros(2, 3), torch.zeros(5, 4))
