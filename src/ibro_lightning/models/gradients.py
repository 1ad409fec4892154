"""Norm and clipping of gradients that may be spread over processes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from functools import reduce

import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor


def grad_norm(parameters: Iterable[Tensor]) -> Tensor:
    """The 2-norm of all gradients, a plain 0-dimensional tensor, equal on all ranks.

    Parameters without a gradient count as 0. Gradients may be plain tensors (each rank has all of them) or DTensors of
    any meshes; every rank must pass the same parameters.
    """
    parameters = list(parameters)
    if not any(isinstance(parameter, DTensor) for parameter in parameters):
        return nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    # Grouped by parameters, not by gradients, so that all ranks join the same reductions.
    sharded: dict[tuple[DeviceMesh, tuple[int, ...]], list[DTensor]] = defaultdict(list)
    plain: list[Tensor] = []
    for parameter in parameters:
        if isinstance(parameter, DTensor):
            mesh, placements = parameter.device_mesh, parameter.placements
            dims = tuple(dim for dim, placement in enumerate(placements) if not placement.is_replicate())
            sharded[mesh, dims].append(parameter)
        elif parameter.grad is not None:
            plain.append(parameter.grad)
    total = _squares(plain)
    for (mesh, dims), group in sharded.items():
        device = _device(mesh)
        squares = _squares([_local_gradient(p) for p in group if p.grad is not None]).to(device)
        for dim in dims:
            distributed.all_reduce(squares, group=mesh.get_group(dim))
        total = total.to(device) + squares
    widest = reduce(torch.promote_types, (parameter.dtype for parameter in parameters), torch.float32)
    return total.sqrt().to(widest)


def clip_gradients(parameters: Iterable[Tensor], max_norm: float) -> Tensor:
    """Scale the gradients down to a total norm of ``max_norm``; 0 leaves them unchanged.

    Returns:
        :func:`grad_norm` before scaling; if it is not finite, the gradients are unusable.
    """
    parameters = list(parameters)
    norm = grad_norm(parameters)
    if not max_norm:
        return norm
    if not any(isinstance(parameter, DTensor) for parameter in parameters):
        return nn.utils.clip_grad_norm_(parameters, max_norm)
    scale = torch.clamp(max_norm / (norm + 1e-6), max=1.0)
    for parameter in parameters:
        if parameter.grad is not None:
            gradient = _local_gradient(parameter)
            gradient.mul_(scale.to(gradient.device))
    return norm


def _local_gradient(parameter: Tensor) -> Tensor:
    gradient = parameter.grad
    assert gradient is not None
    return gradient.to_local() if isinstance(gradient, DTensor) else gradient


def _squares(gradients: list[Tensor]) -> Tensor:
    """Sum of squares, in float64, so that rounding does not depend on how the gradients are sharded."""
    if not gradients:
        return torch.zeros((), dtype=torch.float64)
    norms = [torch.linalg.vector_norm(gradient, dtype=torch.float64) for gradient in gradients]
    return torch.stack(norms).square().sum()


def _device(mesh: DeviceMesh) -> torch.device:
    """Where the mesh's ranks communicate; shards that are offloaded to the CPU are elsewhere."""
    if mesh.device_type == "cpu":
        return torch.device("cpu")
    return torch.device(mesh.device_type, torch.get_device_module(mesh.device_type).current_device())
