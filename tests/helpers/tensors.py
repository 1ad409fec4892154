"""Tensors in float64, and masks of responses."""

from __future__ import annotations

import torch
from torch import Tensor


def doubles(*shape: int, seed: int = 0, grad: bool = False) -> Tensor:
    values = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return values.requires_grad_(grad)


def f64(*values: object) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def prefix_mask(lengths: list[int], columns: int) -> Tensor:
    return torch.arange(columns) < torch.tensor(lengths)[:, None]
