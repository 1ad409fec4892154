"""The exact KL divergence to another distribution, per row of a head, over the whole vocabulary."""

from __future__ import annotations

import math
from abc import abstractmethod

import torch
from torch import Tensor

from ibro_lightning.errors import ConfigError, check_instance, is_number, kind_of
from ibro_lightning.functional.head_functionals import IMPOSSIBLE, HeadFunctional
from ibro_lightning.functional.products import addmm_, exact_products


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
        check_instance("hidden", hidden, Tensor)
        check_instance("weight", weight, Tensor)
        check_instance("bias", bias, Tensor, optional=True)
        check_instance("reverse", reverse, bool)
        if hidden.ndim != 2 or not hidden.is_floating_point():
            raise ConfigError("hidden", kind_of(hidden), "give floating-point [N, D']")
        if weight.ndim != 2 or weight.shape[1] != hidden.shape[1] or not weight.is_floating_point():
            remedy = f"give floating-point [V, D'], here [V, {hidden.shape[1]}] because of hidden"
            raise ConfigError("weight", kind_of(weight), remedy)
        if bias is not None and (bias.shape != weight.shape[:1] or not bias.is_floating_point()):
            raise ConfigError("bias", kind_of(bias), f"give floating-point [V], here [{len(weight)}] because of weight")
        if not (is_number(temperature) and 0 < temperature < math.inf):
            raise ConfigError("temperature", temperature, "write a positive number")
        self.hidden, self.weight = hidden.detach(), weight.detach()
        self.bias = None if bias is None else bias.detach()
        self.temperature, self.reverse = temperature, reverse
        self._dtype = torch.promote_types(hidden.dtype, weight.dtype)
        self._converted: dict[torch.dtype, tuple[Tensor, Tensor]] = {}

    def check(self, rows: int, vocabulary: int) -> None:
        _check_rows("hidden", self.hidden, rows)
        if len(self.weight) != vocabulary:
            remedy = f"this head has a vocabulary of {vocabulary}: give the weight of a head with the same one"
            raise ConfigError("weight", list(self.weight.shape), remedy)

    def _other(self, logits: Tensor, rows: slice) -> Tensor:
        hidden, weight = self._factors(logits.dtype)
        other = logits.new_empty((rows.stop - rows.start, len(weight)))
        with exact_products(hidden.device, self._dtype):
            addmm_(other, hidden[rows], weight.T, beta=0)
        if self.bias is not None:
            other += self.bias.to(logits.dtype)
        return (other / self.temperature).clamp(min=IMPOSSIBLE).log_softmax(dim=1)

    def _factors(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Hidden states and weight in the dtype to multiply in for logits of ``dtype``, converted once: a pass asks for
        them block by block. Only CUDA multiplies half precision into float32."""
        if dtype not in self._converted:
            stays = self.hidden.is_cuda and dtype == torch.float32 and self._dtype.itemsize == 2
            kept = self._dtype if stays else dtype
            self._converted[dtype] = self.hidden.to(kept), self.weight.to(kept)
        return self._converted[dtype]


class KLToLogits(_KL):
    """:class:`KLToHead` where the other head is not plainly linear, so that its logits are there whole.

    Args:
        logits: ``[N, V]`` of the other distribution, row by row of this head's; no gradients reach them.
        reverse: as for :class:`KLToHead`.
    """

    def __init__(self, logits: Tensor, reverse: bool = True) -> None:
        check_instance("logits", logits, Tensor)
        check_instance("reverse", reverse, bool)
        if logits.ndim != 2 or not logits.is_floating_point():
            raise ConfigError("logits", kind_of(logits), "give floating-point [N, V]")
        self.logits, self.reverse = logits.detach(), reverse

    def check(self, rows: int, vocabulary: int) -> None:
        _check_rows("logits", self.logits, rows)
        if self.logits.shape[1] != vocabulary:
            remedy = f"this head has a vocabulary of {vocabulary}: give logits of a head with the same one"
            raise ConfigError("logits", list(self.logits.shape), remedy)

    def _other(self, logits: Tensor, rows: slice) -> Tensor:
        return self.logits[rows].to(logits.dtype).clamp(min=IMPOSSIBLE).log_softmax(dim=1)


def _check_rows(name: str, others: Tensor, rows: int) -> None:
    if len(others) != rows:
        remedy = f"this head has {rows} rows: give as many of the other one, row by row"
        raise ConfigError(name, list(others.shape), remedy)
