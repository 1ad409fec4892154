"""Calls functionals of the head, which users may write, and checks what they return.

A value of another shape would be taken apart row by row, and a gradient of another shape broadcast: a run would go on
and learn from scrambled numbers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ibro_lightning.errors import check_instance, wrong_return
from ibro_lightning.functional.head_functionals import HeadFunctional


def check_functionals(functionals: Mapping[str, HeadFunctional], rows: int, vocabulary: int) -> None:
    """Raise :class:`ConfigError` unless these are functionals that can be computed of ``rows`` rows of logits."""
    check_instance("functionals", functionals, Mapping, " of names to functionals")
    for name, functional in functionals.items():
        check_instance(f"functionals[{name!r}]", functional, HeadFunctional, ", not the class or a function")
        functional.check(rows, vocabulary)


def values_of(functional: HeadFunctional, logits: Tensor, rows: slice) -> tuple[Tensor, ...]:
    """``functional.forward``, checked: its value ``[n]``, and further tensors whose first dimension is n."""
    n = len(logits)
    found = functional.forward(logits, rows)
    if not (isinstance(found, tuple) and found and all(isinstance(x, Tensor) for x in found[1:])):
        raise wrong_return(functional, "forward", found, "return a tuple: the value [n], and what gradient needs")
    value = found[0]
    if not (isinstance(value, Tensor) and value.shape == (n,) and value.is_floating_point()):
        method = "value" if type(functional).forward is HeadFunctional.forward else "forward"
        remedy = f"return [n], one number per row in floating point: here n = {n}"
        raise wrong_return(functional, method, value, remedy)
    for further in found[1:]:
        if further.shape[:1] != (n,):
            raise wrong_return(functional, "forward", further, f"return tensors with one entry per row: here n = {n}")
    return found


def gradient_of(functional: HeadFunctional, logits: Tensor, rows: slice, grad: Tensor, *saved: Tensor) -> Tensor:
    """``functional.gradient``, checked: ``[n, V]``."""
    gradient = functional.gradient(logits, rows, grad, *saved)
    if not (isinstance(gradient, Tensor) and gradient.shape == logits.shape and gradient.is_floating_point()):
        remedy = f"return [n, V], one number per logit: here {list(logits.shape)}"
        raise wrong_return(functional, "gradient", gradient, remedy)
    return gradient


def on_logits(functionals: Mapping[str, HeadFunctional], logits: Tensor) -> dict[str, Tensor]:
    """``{name: [N]}`` of logits ``[N, V]`` that are there whole, divided by the temperature; with gradients."""
    check_functionals(functionals, *logits.shape)
    return {name: _OnLogits.apply(logits, functional) for name, functional in functionals.items()}


class _OnLogits(torch.autograd.Function):
    """A functional's own gradient counts here, too: its value need not have derivatives then."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, functional: HeadFunctional) -> Tensor:
        with torch.autocast(logits.device.type, enabled=False):
            found = values_of(functional, logits, slice(0, len(logits)))
        ctx.functional = functional
        ctx.save_for_backward(logits, *found)
        return found[0].clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        logits, *saved = ctx.saved_tensors
        with torch.autocast(logits.device.type, enabled=False):
            return gradient_of(ctx.functional, logits, slice(0, len(logits)), grad, *saved), None
