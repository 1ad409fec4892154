"""Products of matrices for the head: whatever the dtype of the factors, sums are at least float32."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

# Reentrant: code that runs within a product may multiply by itself.
_precision_lock = threading.RLock()


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype of logits and sums: float32, or float64 for float64."""
    return torch.promote_types(dtype, torch.float32)


def factors(hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Both matrices in the dtype to multiply in: only CUDA multiplies half precision into float32."""
    dtype = hidden.dtype if hidden.is_cuda else wide(hidden.dtype)
    return hidden.to(dtype), weight.to(dtype)


def addmm_(out: Tensor, a: Tensor, b: Tensor, *, beta: float = 1, alpha: float = 1) -> None:
    """``out ← beta out + alpha a b`` in the dtype of ``out``, which on CUDA may be wider than that of a and b."""
    if a.dtype == out.dtype:
        out.addmm_(a, b, beta=beta, alpha=alpha)
    else:
        torch.addmm(out, a, b, out_dtype=out.dtype, beta=beta, alpha=alpha, out=out)


@contextmanager
def exact_products(device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    """On a CPU, multiply values of ``dtype`` bfloat16 that are stored in float32 with bfloat16 instructions.

    These are faster and accumulate in float32, so no logit is rounded; ``dz`` is, to the gradients' own dtype (oneDNN).
    The setting is global to the process, so nothing but the product belongs inside: other float32 products would be
    rounded. The lock keeps one thread from restoring another's.
    """
    if device.type != "cpu" or dtype != torch.bfloat16:
        yield
        return
    products: Any = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    with _precision_lock:
        before, products.fp32_precision = products.fp32_precision, "bf16"
        try:
            yield
        finally:
            products.fp32_precision = before
