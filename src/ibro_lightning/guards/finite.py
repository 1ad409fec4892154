"""Finds NaN in weights and optimizer states, which makes a checkpoint or a policy useless."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def why_not_finite(
    weights: Mapping[str, Any], optimizers: Sequence[Mapping[str, Any]] = (), share: int = 0, shares: int = 1
) -> str | None:
    """The first weight with NaN or infinity, or the first optimizer state with NaN, in a few words; None if there is
    none. (Some optimizers initialise their states with infinity.) Checks every ``shares``-th tensor, beginning with
    number ``share``, and this rank's part of sharded ones."""
    for name, tensor in list(weights.items())[share::shares]:
        low, high = _range(tensor)
        if not (math.isfinite(low) and math.isfinite(high)):
            return f"its weight {name} holds {'NaN' if math.isnan(low) else 'infinity'}"
    for name, tensor in list(_states(optimizers))[share::shares]:
        if math.isnan(_range(tensor)[0]):
            return f"{name} holds NaN"
    return None


def _states(optimizers: Sequence[Mapping[str, Any]]) -> Iterable[tuple[str, Any]]:
    for number, optimizer in enumerate(optimizers):
        for parameter, values in optimizer.get("state", {}).items():
            for name, value in values.items() if isinstance(values, Mapping) else ():
                yield f"{name} of parameter {parameter} in optimizer {number}", value


def _range(tensor: Any) -> tuple[float, float]:
    """The smallest and the largest element; NaN and NaN if one is NaN. Unlike ``isfinite``, it allocates nothing."""
    if isinstance(tensor, DTensor):
        tensor = tensor.to_local()
    if not isinstance(tensor, Tensor) or tensor.dtype not in _FLOATS or not tensor.numel() or tensor.is_meta:
        return 0.0, 0.0
    low, high = tensor.detach().aminmax()
    return float(low), float(high)
