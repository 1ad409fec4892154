"""The norm of gradients that may be spread over processes, and scaling them down to one."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor


def grad_norm(parameters: Iterable[Tensor]) -> Tensor:
    """The 2-norm of all gradients together, a plain tensor without dimensions, equal on all ranks.

    Parameters without a gradient count as 0. Gradients may be plain tensors (each rank has all of them) or DTensors of
    any meshes; every rank must pass the same parameters.
    """
    parameters = list(parameters)
    if not any(isinstance(parameter, DTensor) for parameter in parameters):
        return nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    # From the parameters and not from their gradients, so that all ranks take part in the same sums.
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
    return total.sqrt().to(_widest(parameters))


def clip_gradients(parameters: Iterable[Tensor], max_norm: float) -> Tensor:
    """Scale the gradients down to ``max_norm`` together; 0 leaves them as they are.

    Returns:
        :func:`grad_norm` before, which may not be finite: then the gradients are of no use.
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
    """The sum of squares, in float64: what is rounded must not depend on how the gradients are cut."""
    if not gradients:
        return torch.zeros((), dtype=torch.float64)
    norms = [torch.linalg.vector_norm(gradient, dtype=torch.float64) for gradient in gradients]
    return torch.stack(norms).square().sum()


def _device(mesh: DeviceMesh) -> torch.device:
    """Where the mesh's ranks can talk: shards that are offloaded to the CPU are not there."""
    if mesh.device_type == "cpu":
        return torch.device("cpu")
    return torch.device(mesh.device_type, torch.get_device_module(mesh.device_type).current_device())


def _widest(parameters: list[Tensor]) -> torch.dtype:
    dtype = torch.float32
    for parameter in parameters:
        dtype = torch.promote_types(dtype, parameter.dtype)
    return dtype
