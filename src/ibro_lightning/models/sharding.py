"""Shards a network over processes: fully_shard around each decoder block and the whole, tensor parallel inside."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor

from ibro_lightning.models.tensor_parallel import parallelize


@dataclass(frozen=True)
class Sharding:
    """How a network is spread over processes. Made by a strategy for ``build_policy`` and ``build_critic``.

    Args:
        mesh: two dimensions, named ``data_parallel`` (weights are sharded over it) and ``tensor_parallel``.
        device: where this process computes.
        dtype: what the decoder blocks' weights are gathered and multiplied in, under autocast of the same dtype;
            None: as they are stored. Gradients are summed over ranks in float32.
        cpu_offload: shards, gradients and optimizer states stay in the CPU's memory.
        reshard_after_forward: free a block's gathered weights after its forward pass, and gather them again for the
            backward pass: less memory, more communication.
    """

    mesh: DeviceMesh
    device: torch.device
    dtype: torch.dtype | None = None
    cpu_offload: bool = False
    reshard_after_forward: bool = True

    @property
    def data_parallel_size(self) -> int:
        """Ranks that see different data, over which sums over tokens and means of gradients are taken."""
        return self.mesh["data_parallel"].size()

    @property
    def tensor_parallel_size(self) -> int:
        """Ranks that share one copy of the blocks' arithmetic and see the same data."""
        return self.mesh["tensor_parallel"].size()

    @property
    def parameter_device(self) -> torch.device:
        """Where the shards are kept."""
        return torch.device("cpu") if self.cpu_offload else self.device


def shard(network: nn.Module, sharding: Sharding) -> None:
    """Shard ``network`` (a Policy or a Critic whose ``model`` is on the meta device) in place. It stays empty.

    Its blocks are groups of their own, and so is an input embedding that is not tied to the head; the rest belongs to
    ``network`` itself, whose forward pass reads the head's weight without calling the head.

    Raises:
        ConfigError: the model cannot be sharded by ``tensor_parallel_size``.
    """
    model: Any = network.model
    if sharding.tensor_parallel_size > 1:
        parallelize(model, decoder_blocks(model), sharding.mesh["tensor_parallel"])
    offload: OffloadPolicy = OffloadPolicy()
    if sharding.cpu_offload:
        offload = CPUOffloadPolicy(pin_memory=sharding.device.type == "cuda")
    common: dict[str, Any] = {
        "mesh": sharding.mesh["data_parallel"],
        "reshard_after_forward": sharding.reshard_after_forward,
        "offload_policy": offload,
    }
    # Inputs are not cast: autocast converts the operands of products, and casting would round the residual stream at
    # every block, unlike on a single device.
    precision = MixedPrecisionPolicy(sharding.dtype, torch.float32 if sharding.dtype else None, None, False)
    for block in decoder_blocks(model):
        fully_shard(block, mp_policy=precision, **common)
    embedding = model.get_input_embeddings()
    if embedding is not None and not _is_shared(embedding, model):
        fully_shard(embedding, **common)
    fully_shard(network, **common)
    for method in ("check_packing", "settle_sharing", "ensure_deterministic", "kl_to"):
        if hasattr(network, method):
            register_fsdp_forward_method(network, method)


def decoder_blocks(model: Any) -> list[nn.Module]:
    """The model's repeated layers: those that transformers does not split, or else its longest list of modules."""
    names = set(getattr(model, "_no_split_modules", None) or ())
    blocks = [module for module in model.modules() if type(module).__name__ in names]
    if not blocks:
        lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
        blocks = list(max(lists, key=len, default=[]))
    inner = {id(part) for block in blocks for part in block.modules() if part is not block}
    return [block for block in blocks if id(block) not in inner and not _is_shared(block, model)]


def _is_shared(part: nn.Module, model: nn.Module) -> bool:
    """Whether a parameter of ``part`` also belongs to another part of the model (tied weights)."""
    ours = {id(parameter) for parameter in part.parameters()}
    inside = {id(module) for module in part.modules()}
    return any(
        id(parameter) in ours
        for module in model.modules()
        if id(module) not in inside
        for parameter in module.parameters(recurse=False)
    )


def local_slices(tensor: DTensor) -> tuple[slice, ...]:
    """This rank's part of the whole tensor, one slice per dimension.

    Meshes are read from the right: ``fully_shard`` shards what tensor parallelism leaves to a rank.
    """
    ranges = [(0, size) for size in tensor.shape]
    coordinate = tensor.device_mesh.get_coordinate()
    assert coordinate is not None, "this rank is part of the mesh"
    for mesh_dim in reversed(range(tensor.device_mesh.ndim)):
        dim = getattr(tensor.placements[mesh_dim], "dim", None)
        if dim is not None:
            start, stop = ranges[dim]
            size = -(-(stop - start) // tensor.device_mesh.size(mesh_dim))
            first = min(start + coordinate[mesh_dim] * size, stop)
            ranges[dim] = (first, min(first + size, stop))
    return tuple(slice(*bounds) for bounds in ranges)


def full_tensor(tensor: Tensor) -> Tensor:
    """A detached whole tensor; all ranks must call this for a sharded one. Offloaded shards meet on the device."""
    if not isinstance(tensor, DTensor):
        return tensor.detach()
    if tensor.device.type != tensor.device_mesh.device_type:
        tensor = cast(DTensor, tensor.to(tensor.device_mesh.device_type))
    return tensor.full_tensor().detach()


def is_sharded(module: nn.Module) -> bool:
    """Whether this module's weights are spread over ranks, so that all ranks must take part in reading one."""
    return any(isinstance(part, FSDPModule) for part in module.modules()) or any(
        isinstance(parameter, DTensor) for parameter in module.parameters()
    )


def named_parameters(module: nn.Module) -> Iterator[tuple[str, str, nn.Parameter]]:
    """``(name, first name of the same parameter, parameter)``: tied parameters under each of their names."""
    first: dict[int, str] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        yield name, first.setdefault(id(parameter), name), parameter


def materialize(module: nn.Module, device: torch.device) -> None:
    """Allocate the meta parameters of a sharded module, keeping ties. Buffers are left uninitialized."""
    names = [(name, canonical) for name, canonical, _ in named_parameters(module)]
    module.to_empty(device=device)
    for name, canonical in names:
        if name != canonical:
            owner, _, leaf = name.rpartition(".")
            # Not through setattr: fully_shard itself keeps track of shared parameters.
            module.get_submodule(owner)._parameters[leaf] = module.get_parameter(canonical)
