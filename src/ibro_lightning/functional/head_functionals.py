"""What a head can give besides log-probs and entropy: one number per row, from a chunk of its logits.

:func:`.linear_head` computes them in the same pass as log-probs and entropy, without the ``[N, V]`` logits. One of your
own is a class with one method::

    class TopProbability(HeadFunctional):
        def value(self, logits, rows):
            return logits.softmax(dim=1).amax(dim=1)

Autograd differentiates it within each chunk. Those here have their gradients written out, which takes a pass less.
With ``p = softmax(z)``, everything is in nats.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from numbers import Integral

import numpy as np
import torch
from torch import Tensor

from ibro_lightning.errors import ConfigError, is_number, wrong_return

_FIRST_TOP = 1024


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
            value = self.value(leaf, rows)
            gradient = None
            if value.requires_grad:
                (gradient,) = torch.autograd.grad(value, leaf, grad, allow_unused=True)
        if gradient is None:
            remedy = "compute it from logits without detach, no_grad or item, or override gradient"
            raise wrong_return(self, "value", value, f"autograd finds no derivatives by the logits in it: {remedy}")
        return gradient

    def check(self, rows: int, vocabulary: int) -> None:  # noqa: B027
        """Called once per pass, before anything is computed, with N and V: to raise :class:`.ConfigError` if the
        functional cannot be computed for them. Does nothing unless overridden."""


class RestrictedEntropy(HeadFunctional):
    """The entropy of the distribution renormalised over the likeliest tokens, which AEnt and SIREN use.

    Ties at the edge are all inside.

    Args:
        top_p: the fewest tokens that together have at least this probability.
        top_fraction: the likeliest tokens that make up this share of the vocabulary, rounded to whole tokens.
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
        lowest = self.forward(logits.detach(), rows)[1]
        logq = logits.masked_fill(logits < lowest.unsqueeze(1), -torch.inf).log_softmax(dim=1)
        return _entropy(logq)

    def forward(self, logits: Tensor, rows: slice) -> tuple[Tensor, ...]:
        """The entropy, the smallest logit inside, and the log of the sum of exponentials inside, less that logit."""
        if self.top_p is not None:
            return _of_mass(logits, logits.logsumexp(dim=1, keepdim=True), self.top_p, _FIRST_TOP).unbind()
        assert self.top_fraction is not None
        lowest = _kth_largest(logits, max(1, round(self.top_fraction * logits.shape[1])))
        above = logits.amax(dim=1) - lowest
        shifted = _inside(logits, lowest, above)  # its largest is 0
        exps = shifted.exp()
        total = exps.sum(dim=1)
        return total.log() - torch.linalg.vecdot(shifted, exps) / total, lowest, above + total.log()

    def gradient(self, logits: Tensor, rows: slice, grad: Tensor, *saved: Tensor) -> Tensor:
        """−q_j (log q_j + H) inside; outside nothing (1e-35 at most): the edge moves with no derivative."""
        entropy, lowest, log_total = saved
        logq = _inside(logits, lowest, log_total)
        inner = torch.mul(logq, -grad.unsqueeze(1)).sub_((grad * entropy).unsqueeze(1))
        return inner.mul_(logq.exp_())


IMPOSSIBLE = -1e30
"""In place of −inf, so that 0·log 0 is 0."""


def _entropy(logq: Tensor) -> Tensor:
    return -(logq.exp() * logq.clamp(min=IMPOSSIBLE)).sum(dim=1)


def _inside(logits: Tensor, lowest: Tensor, total: Tensor) -> Tensor:
    """``logits − lowest − total`` where logits reach ``lowest``; elsewhere a number whose exponential is negligible
    beside 1 and still no denormal, for which a CPU takes twenty times as long. A comparison with a mask would be slower
    than this threshold, too."""
    tiny = torch.finfo(logits.dtype).tiny
    above = torch.threshold_(logits - lowest.unsqueeze(1), -tiny, IMPOSSIBLE)
    return above.sub_(total.unsqueeze(1)).clamp_(min=math.log(tiny) + 1)


def _of_mass(logits: Tensor, total: Tensor, mass: float, count: int) -> Tensor:
    """``[3, n]``: what :meth:`RestrictedEntropy.forward` returns, of the fewest tokens with this probability.

    Args:
        total: ``[n, 1]`` log of the sum of exponentials.
        count: how many of the largest logits are tried first; rows that need more try eight times as many.
    """
    last = min(count, logits.shape[1]) - 1
    top = _largest(logits, last + 1)
    reached = ((top - total).exp().cumsum(dim=1) < mass).sum(dim=1, keepdim=True).clamp(max=last)
    edge = top.gather(1, reached)
    logq = top.masked_fill(top < edge, -torch.inf).log_softmax(dim=1)
    found = torch.stack((_entropy(logq), edge.squeeze(1), (top - logq - edge)[:, 0]))
    short = (edge == top[:, last:]).squeeze(1)  # then further tokens may be needed, or tie with the last one
    if last + 1 < logits.shape[1] and short.any():
        found[:, short] = _of_mass(logits[short], total[short], mass, 8 * count)
    return found


# On a CPU numpy selects and sorts in vector instructions: on one thread, which it stays on, in a fifth of torch.topk's
# time (benchmarks/README.md).


def _kth_largest(logits: Tensor, k: int) -> Tensor:
    """``[n]``, k from 1."""
    if logits.device.type != "cpu":
        return logits.topk(k, dim=1).values[:, -1]
    place = logits.shape[1] - k
    return torch.from_numpy(np.partition(logits.numpy(), place, axis=1)[:, place].copy())


def _largest(logits: Tensor, count: int) -> Tensor:
    """The ``count`` largest of each row, from the largest down."""
    if logits.device.type != "cpu":
        return logits.topk(count, dim=1).values
    place = logits.shape[1] - count
    top = np.partition(logits.numpy(), place, axis=1)[:, place:]
    return torch.from_numpy(np.sort(top, axis=1)).flip(1)


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

    def check(self, rows: int, vocabulary: int) -> None:
        if vocabulary < 2:
            raise ConfigError("functionals", "Margin", "it needs a vocabulary of two tokens or more, and here is one")

    def value(self, logits: Tensor, rows: slice) -> Tensor:
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
        integral = isinstance(token_ids, Iterable) and all(
            isinstance(token, Integral) and not isinstance(token, bool) for token in token_ids
        )
        if not integral or not token_ids or len(set(token_ids)) < len(token_ids) or min(token_ids) < 0:
            given = token_ids if isinstance(token_ids, str) or not integral else list(token_ids)
            raise ConfigError("token_ids", given, "write different token ids, 0 or more, as a list")
        self.token_ids = tuple(map(int, token_ids))

    def check(self, rows: int, vocabulary: int) -> None:
        if max(self.token_ids) >= vocabulary:
            remedy = f"write ids below {vocabulary}, the size of the vocabulary"
            raise ConfigError("token_ids", max(self.token_ids), remedy)

    def value(self, logits: Tensor, rows: slice) -> Tensor:
        chosen = logits[:, list(self.token_ids)]
        return (chosen - logits.logsumexp(dim=1, keepdim=True)).exp().sum(dim=1)

    def gradient(self, logits: Tensor, rows: slice, grad: Tensor, *saved: Tensor) -> Tensor:
        """p_j (1{j chosen} − P)."""
        out = logits.softmax(dim=1)
        chosen = list(self.token_ids)
        at_chosen = out[:, chosen] * ((1 - saved[0]) * grad).unsqueeze(1)
        out.mul_((-saved[0] * grad).unsqueeze(1))
        out[:, chosen] = at_chosen
        return out
