"""Converts weights and optimizer states of sharded networks to and from the format of a single process.

Tensors are gathered one at a time: rank 0 keeps each on the CPU, the others free it before the next. In the other
direction every rank takes its own part of the (memory-mapped) whole tensor.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from ibro_lightning.models import full_tensor, local_part


def full_model_state(module: nn.Module) -> dict[str, Any]:
    """``module.state_dict()`` with whole tensors on rank 0, where tied ones share memory; empty on other ranks."""
    kept: dict[str, Any] = {}
    copies: dict[int, Tensor] = {}
    for name, value in module.state_dict(keep_vars=True).items():
        if not isinstance(value, Tensor):  # a module's extra state
            kept[name] = value
        elif id(value) in copies:
            kept[name] = copies[id(value)]
        else:
            kept[name] = copies[id(value)] = _to_rank_zero(value)
    return kept if _is_rank_zero() else {}


def full_optimizer_state(optimizer: Optimizer) -> dict[str, Any]:
    """``optimizer.state_dict()`` with whole tensors on rank 0; without the states on other ranks."""
    state = optimizer.state_dict()
    whole_states = {
        index: {key: _to_rank_zero(value) if isinstance(value, Tensor) else value for key, value in entry.items()}
        for index, entry in state["state"].items()
    }
    return {**state, "state": whole_states if _is_rank_zero() else {}}


def load_model_state(module: nn.Module, state: Mapping[str, Any], strict: bool = True) -> None:
    """Load a module, sharded or not, from a whole ``state_dict``.

    Raises:
        RuntimeError: names or shapes do not match (from ``load_state_dict``).
    """
    current = module.state_dict()
    parts = {}
    for name, value in state.items():
        own = current.get(name)
        if isinstance(own, DTensor) and own.shape == value.shape:
            own.to_local().copy_(local_part(own, value))  # in place, as a second set of shards may not fit in memory
            value = own
        parts[name] = value
    module.load_state_dict(parts, strict=strict)


def load_optimizer_state(optimizer: Optimizer, state: Mapping[str, Any]) -> None:
    """Load an optimizer, with sharded parameters or not, from a whole ``state_dict``; parameters match by position."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    # The state's own parameter numbers, in the order of its groups: not every writer counts from 0.
    numbers = [number for group in state["param_groups"] for number in group["params"]]
    owners = dict(zip(numbers, parameters, strict=True))
    parts: dict[Any, dict[str, Any]] = {}
    for number, entry in state["state"].items():
        owner = owners[number]
        parts[number] = {
            key: _like(owner, value)
            if isinstance(owner, DTensor) and isinstance(value, Tensor) and value.shape == owner.shape
            else value
            for key, value in entry.items()
        }
    optimizer.load_state_dict({**state, "state": parts})


def _like(parameter: DTensor, value: Tensor) -> DTensor:
    """This rank's part of ``value``, sharded like ``parameter``."""
    part = local_part(parameter, value).to(parameter.to_local().device, copy=True)
    return DTensor.from_local(
        part,
        parameter.device_mesh,
        parameter.placements,
        run_check=False,
        shape=parameter.shape,
        stride=parameter.stride(),
    )


def _to_rank_zero(tensor: Tensor) -> Tensor:
    full = full_tensor(tensor)
    return full.cpu() if _is_rank_zero() else torch.empty(0)


def _is_rank_zero() -> bool:
    return not distributed.is_initialized() or distributed.get_rank() == 0
