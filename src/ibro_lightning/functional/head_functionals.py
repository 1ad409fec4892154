"""What a head can tell besides log-probs and entropy: one number per row, from a chunk of its logits.

:func:`.linear_head` computes them in the same pass as log-probs and entropy, without the ``[N, V]`` logits. One of your
own is a class with one method::

    class TopProbability(HeadFunctional):
        def value(self, logits, rows):
            return logits.softmax(dim=1).amax(dim=1)

Autograd differentiates it within each chunk. Those here have their gradients written out, which takes a pass less.
With ``p = softmax(z)``, everything is in nats.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from ibro_lightning.errors import ConfigError, check_instance, is_number

_FIRST_TOP = 64


class HeadFunctional(ABC):
    """A number per row of a head's distribution."""

    @abstractmethod
    def value(self, logits: Tensor, rows: slice) -> Tensor:
        """``[n]`` from ``logits [n, V]``, float32 or float64, divided by the temperature; with derivatives unless
        :meth:`gradient` is overridden. Must not write to ``logits``.

        Args:
            rows: which of the N rows these are, for functionals that hold something per row.
        """

    def forward(self, logits: Tensor, rows: slice) -> tuple[Tensor, ...]:
        """:meth:`value`, and further tensors ``[n]`` that :meth:`gradient` gets; computed without gradients."""
        return (self.value(logits, rows),)

    def gradient(self, logits: Tensor, rows: slice, grad: Tensor, *saved: Tensor) -> Tensor:
        """``Σ grad · ∂value/∂logits``, ``[n, V]``; ``saved`` is what :meth:`forward` returned."""
        with torch.enable_grad():
            leaf = logits.detach().requires_grad_()
            (gradient,) = torch.autograd.grad(self.value(leaf, rows), leaf, grad)
        return gradient


class RestrictedEntropy(HeadFunctional):
    """The entropy of the distribution renormalised over the likeliest tokens, which AEnt and SIREN use.

    Ties at the edge are all inside.

    Args:
        top_p: the fewest tokens that together have at least this probability.
        top_fraction: so large a share of the vocabulary.
    """

    def __init__(self, top_p: float | None = None, top_fraction: float | None = None) -> None:
        given = {name: value for name, value in (("top_p", top_p), ("top_fraction", top_fraction)) if value is not None}
        if len(given) != 1:
            raise ConfigError("top_p", top_p, "write either top_p or top_fraction")
        ((name, value),) = given.items()
        if not (is_number(value) and 0 < value <= 1):
            raise ConfigError(name, value, "write a number above 0 and up to 1")
        self.top_p, self.top_fraction = top_p, top_fraction

    def value(self, logits: Tensor, rows: slice) -> Tensor:
        return self.forward(logits, rows)[0]

    def forward(self, logits: Tensor, rows: slice) -> tuple[Tensor, ...]:
        lowest = self._lowest(logits)
        inside = logits.masked_fill(logits < lowest.unsqueeze(1), -torch.inf)
        logq = inside.log_softmax(dim=1)
        return -(logq.exp() * logq.clamp(min=_IMPOSSIBLE)).sum(dim=1), lowest

    def gradient(self, logits: Tensor, rows: slice, grad: Tensor, *saved: Tensor) -> Tensor:
        """−q_j (log q_j + H) inside, 0 outside: the edge moves with no derivative."""
        entropy, lowest = saved
        logq = logits.masked_fill(logits < lowest.unsqueeze(1), -torch.inf).log_softmax(dim=1)
        inner = logq.clamp(min=_IMPOSSIBLE).add_(entropy.unsqueeze(1))
        return inner.mul_(logq.exp_()).mul_(-grad.unsqueeze(1))

    def _lowest(self, logits: Tensor) -> Tensor:
        """The smallest logit inside, ``[n]``."""
        size = logits.shape[1]
        if self.top_fraction is not None:
            return logits.topk(max(1, round(self.top_fraction * size)), dim=1).values[:, -1]
        assert self.top_p is not None
        total = logits.logsumexp(dim=1, keepdim=True)
        count = min(_FIRST_TOP, size)
        while True:
            top = logits.topk(count, dim=1).values
            mass = (top - total).exp().cumsum(dim=1)
            if count == size or not len(logits) or mass[:, -1].min() >= self.top_p:
                reached = (mass < self.top_p).sum(dim=1, keepdim=True).clamp(max=count - 1)
                return top.gather(1, reached).squeeze(1)
            count = min(8 * count, size)


_IMPOSSIBLE = -1e30
"""In place of −inf, so that 0·log 0 is 0."""


class Collision(HeadFunctional):
    """``Σ p²``, the probability that two draws agree: Rényi's entropy of order 2 is −log of it, Tsallis' 1 − it."""

    def value(self, logits: Tensor, rows: slice) -> Tensor:
        return (2 * logits.log_softmax(dim=1)).exp().sum(dim=1)

    def gradient(self, logits: Tensor, rows: slice, grad: Tensor, *saved: Tensor) -> Tensor:
        """2 p_j (p_j − Σp²)."""
        p = logits.softmax(dim=1)
        return (p - saved[0].unsqueeze(1)).mul_(p).mul_(2 * grad.unsqueeze(1))


class Margin(HeadFunctional):
    """The probability of the likeliest token minus that of the next."""

    def value(self, logits: Tensor, rows: slice) -> Tensor:
        if logits.shape[1] < 2:
            raise ValueError("a vocabulary of one token has no second one")
        first, second = (logits.topk(2, dim=1).values - logits.logsumexp(dim=1, keepdim=True)).exp().unbind(dim=1)
        return first - second

    def gradient(self, logits: Tensor, rows: slice, grad: Tensor, *saved: Tensor) -> Tensor:
        """p_1 (1{j = 1} − p_j) − p_2 (1{j = 2} − p_j)."""
        p = logits.softmax(dim=1)
        top = p.topk(2, dim=1)
        signed = top.values * torch.tensor([1.0, -1.0], dtype=p.dtype, device=p.device)
        out = p.mul_((-saved[0] * grad).unsqueeze(1))
        return out.scatter_add_(1, top.indices, signed * grad.unsqueeze(1))


class TokenProbability(HeadFunctional):
    """The probability of any of some tokens, such as the end of a response.

    Args:
        token_ids: different ids within the vocabulary.
    """

    def __init__(self, token_ids: Sequence[int]) -> None:
        if not token_ids or len(set(token_ids)) < len(token_ids) or min(token_ids) < 0:
            raise ConfigError("token_ids", list(token_ids), "write different token ids, 0 or more")
        self.token_ids = tuple(token_ids)

    def value(self, logits: Tensor, rows: slice) -> Tensor:
        chosen = logits[:, list(self.token_ids)]
        return (chosen - logits.logsumexp(dim=1, keepdim=True)).exp().sum(dim=1)

    def gradient(self, logits: Tensor, rows: slice, grad: Tensor, *saved: Tensor) -> Tensor:
        """p_j (1{j chosen} − P)."""
        out = logits.softmax(dim=1)
        chosen = list(self.token_ids)
        at_chosen = out[:, chosen] * (1 - saved[0]).unsqueeze(1)
        out.mul_(-saved[0].unsqueeze(1))
        out[:, chosen] = at_chosen
        return out.mul_(grad.unsqueeze(1))


class _KL(HeadFunctional):
    """The exact KL divergence between this head's distribution and another one, over the whole vocabulary."""

    reverse: bool

    @abstractmethod
    def _other(self, logits: Tensor, rows: slice) -> Tensor:
        """``[n, V]`` log-probs of the other distribution."""

    def value(self, logits: Tensor, rows: slice) -> Tensor:
        logp, logr = logits.log_softmax(dim=1), self._other(logits, rows)
        log_of, log_to = (logp, logr) if self.reverse else (logr, logp)
        return (log_of.exp() * (log_of - log_to)).sum(dim=1)

    def gradient(self, logits: Tensor, rows: slice, grad: Tensor, *saved: Tensor) -> Tensor:
        """p_j (log p_j − log r_j − KL) in reverse, p_j − r_j otherwise."""
        logp, logr = logits.log_softmax(dim=1), self._other(logits, rows)
        if not self.reverse:
            return (logp.exp_() - logr.exp_()).mul_(grad.unsqueeze(1))
        inner = (logp - logr).sub_(saved[0].unsqueeze(1))
        return inner.mul_(logp.exp_()).mul_(grad.unsqueeze(1))


class KLToHead(_KL):
    """The exact KL divergence between this head's distribution and another's, over the whole vocabulary.

    Args:
        hidden: ``[N, D']``, what the other head reads, row by row of this one; no gradients reach it.
        weight: ``[V, D']`` of the other head.
        bias: ``[V]`` of the other head.
        temperature: of the other head.
        reverse: KL(this ‖ other), which a penalty to a reference is; otherwise KL(other ‖ this), as in distillation.
    """

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        temperature: float = 1.0,
        reverse: bool = True,
    ) -> None:
        for name, value in (("hidden", hidden), ("weight", weight)):
            check_instance(name, value, Tensor)
        if hidden.ndim != 2 or weight.ndim != 2 or hidden.shape[1] != weight.shape[1]:
            shapes = f"{list(hidden.shape)} and {list(weight.shape)}"
            raise ValueError(f"hidden must be [N, D] and weight [V, D], got {shapes}")
        if not temperature > 0:
            raise ValueError(f"temperature must be positive, got {temperature}")
        self.hidden, self.weight = hidden.detach(), weight.detach()
        self.bias = None if bias is None else bias.detach()
        self.temperature, self.reverse = temperature, reverse

    def _other(self, logits: Tensor, rows: slice) -> Tensor:
        other = self.hidden[rows].to(logits.dtype) @ self.weight.to(logits.dtype).T
        if self.bias is not None:
            other += self.bias.to(logits.dtype)
        return (other / self.temperature).clamp(min=_IMPOSSIBLE).log_softmax(dim=1)


class KLToLogits(_KL):
    """:class:`KLToHead` where the other head is not plainly linear, so that its logits are there whole.

    Args:
        logits: ``[N, V]`` of the other distribution, row by row of this head's; no gradients reach them.
        reverse: as for :class:`KLToHead`.
    """

    def __init__(self, logits: Tensor, reverse: bool = True) -> None:
        check_instance("logits", logits, Tensor)
        self.logits, self.reverse = logits.detach(), reverse

    def _other(self, logits: Tensor, rows: slice) -> Tensor:
        return self.logits[rows].to(logits.dtype).clamp(min=_IMPOSSIBLE).log_softmax(dim=1)
