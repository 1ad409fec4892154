"""``trainer.strategy: fsdp2``: weights, gradients, optimizer states and checkpoints are sharded over all ranks."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.utilities.types import _PATH
from lightning.pytorch.strategies import ModelParallelStrategy, StrategyRegistry
from torch import Tensor, distributed
from torch.optim import Optimizer

from ibro_lightning.errors import ConfigError, check_count
from ibro_lightning.models import Sharding
from ibro_lightning.models.weight_files import raise_on_all_ranks
from ibro_lightning.runs.checkpoints.plugin import read_checkpoint, refuse_non_finite, refusing
from ibro_lightning.runs.checkpoints.shards import check_shards_fit, load_shards, save_shards
from ibro_lightning.runs.checkpoints.validity import why_known_invalid
from ibro_lightning.strategies.states import (
    full_model_state,
    full_optimizer_state,
    load_model_state,
    load_optimizer_state,
)

PRECISIONS = {"32-true": None, "bf16-mixed": torch.bfloat16}


class FSDP2Strategy(ModelParallelStrategy):
    """Fully sharded data parallelism (``torch.distributed.fsdp.fully_shard``), on GPUs (NCCL) and on CPUs (gloo).

    Networks are sharded as they are built (``build_policy(..., sharding=strategy.sharding)``); Lightning moves and
    initialises nothing. All ranks write and read checkpoints collectively, and any strategy reads them: optimizer
    states are keyed by the parameter's position in its optimizer, not by its name, as in Lightning's strategy.

    Args:
        tensor_parallel_size: number of ranks that split the computation of each decoder block and see the same data;
            they should be on one machine. The number of data-parallel ranks is the world size divided by it.
        cpu_offload: keep shards, gradients and optimizer states in the CPU's memory: slow, for models that do not fit.
        reshard_after_forward: free gathered weights after the forward pass; False keeps them until the backward pass,
            which takes more memory and less communication.
        save_distributed_checkpoint: write a folder to which every rank adds its shards (DCP), for large models. False
            writes one file, like every other strategy; any strategy can load both.
        timeout: how long a rank waits for another.
        process_group_backend: None means nccl on GPUs and gloo on CPUs.
    """

    def __init__(
        self,
        tensor_parallel_size: int = 1,
        cpu_offload: bool = False,
        reshard_after_forward: bool = True,
        save_distributed_checkpoint: bool = False,
        timeout: timedelta = timedelta(minutes=30),
        process_group_backend: str | None = None,
    ) -> None:
        check_count("tensor_parallel_size", tensor_parallel_size)
        if timeout <= timedelta(0):
            raise ConfigError("timeout", str(timeout), "write a positive time, such as 00:30:00")
        super().__init__(
            tensor_parallel_size=tensor_parallel_size,
            save_distributed_checkpoint=save_distributed_checkpoint,
            process_group_backend=process_group_backend,
            timeout=timeout,
        )
        self.cpu_offload, self.reshard_after_forward = cpu_offload, reshard_after_forward

    def setup_environment(self) -> None:
        precision, world, size = self.precision_plugin.precision, self.world_size, self._tensor_parallel_size
        if precision not in PRECISIONS:
            raise ConfigError("trainer.precision", precision, "not supported with fsdp2: write 32-true or bf16-mixed")
        assert isinstance(size, int)
        if world % size:
            raise ConfigError("tensor_parallel_size", size, f"it must divide the number of processes, which is {world}")
        self._data_parallel_size = world // size
        super().setup_environment()

    @property
    def sharding(self) -> Sharding | None:
        """How to shard networks when building them; None before the process group exists."""
        if self._device_mesh is None:
            return None
        dtype = PRECISIONS[str(self.precision_plugin.precision)]
        return Sharding(self._device_mesh, self.root_device, dtype, self.cpu_offload, self.reshard_after_forward)

    def _get_process_group_backend(self) -> str:
        backend = super()._get_process_group_backend()
        # Offloaded shards are gathered and saved from the CPU's memory, which NCCL cannot do.
        return "cpu:gloo,cuda:nccl" if self.cpu_offload and backend == "nccl" else backend

    def model_to_device(self) -> None:
        """Move what was not built sharded; offloaded shards stay on the CPU."""
        if not self.cpu_offload:
            super().model_to_device()
            return
        assert self.lightning_module is not None
        for module in self.lightning_module.modules():
            for name, buffer in module.named_buffers(recurse=False):
                module._buffers[name] = buffer.to(self.root_device)
        self.lightning_module._device = self.root_device  # what .to() would have set

    def reduce(self, tensor: Any, group: Any = None, reduce_op: Any = "mean") -> Tensor:
        """Reduce over the data-parallel ranks unless a group is given: tensor-parallel ranks see the same data."""
        if group is None and self._device_mesh is not None:
            group = self._device_mesh["data_parallel"].get_group()
        return super().reduce(tensor, group, reduce_op)

    def reduce_boolean_decision(self, decision: bool, all: bool = True) -> bool:
        """Decide over all ranks: what one of them cannot do, its tensor-parallel peers cannot either."""
        votes = torch.tensor(int(decision), device=self.root_device)
        distributed.all_reduce(votes)
        return int(votes) == self.world_size if all else bool(votes)

    # A checkpoint file is gathered, and distributed, one tensor at a time; a folder holds each rank's shards.

    @property
    def lightning_restore_optimizer(self) -> bool:
        return True

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Whole weights on rank 0; for a folder, this rank's shards, uncopied, as they are written at once."""
        assert self.lightning_module is not None
        module = self.lightning_module
        return module.state_dict() if self._save_distributed_checkpoint else full_model_state(module)

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        plain = _plain(optimizer)
        return plain.state_dict() if self._save_distributed_checkpoint else full_optimizer_state(plain)

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: _PATH, storage_options: Any = None) -> None:
        if self._save_distributed_checkpoint:
            save_shards(Path(self.broadcast(filepath)), checkpoint, is_first=self.is_global_zero)
        elif self.is_global_zero:  # everything is already gathered there
            self.checkpoint_io.save_checkpoint(checkpoint, filepath, storage_options)

    def load_checkpoint(self, checkpoint_path: _PATH, weights_only: bool | None = None) -> dict[str, Any]:
        """Read a checkpoint. A folder's weights and optimizers are loaded here, a file's by the methods below.

        A checkpoint that this process has not checked yet is checked first, with its parts divided among the ranks; if
        one of them refuses it, all do.
        """
        path = Path(self.broadcast(checkpoint_path))
        raise_on_all_ranks(lambda: self._check(path))
        loaded: dict[str, Any] = raise_on_all_ranks(
            lambda: self._load_folder(path) if path.is_dir() else self._map_file(path)
        )
        return loaded

    def _check(self, path: Path) -> None:
        if (reason := why_known_invalid(path, self.global_rank, self.world_size)) is not None:
            raise ConfigError("ckpt_path", str(path), reason)
        if path.is_dir():  # checked here, as an error within DCP's collectives would hang the other ranks
            assert self.lightning_module is not None
            with refusing(path):
                check_shards_fit(path, self.lightning_module)

    def _load_folder(self, path: Path) -> dict[str, Any]:
        assert self.lightning_module is not None
        optimizers = [_plain(optimizer) for optimizer in self.optimizers]
        with refusing(path):
            rest = load_shards(path, self.lightning_module, optimizers)
        states = [optimizer.state_dict() for optimizer in optimizers]
        refuse_non_finite(path, self.lightning_module.state_dict(), states)  # this rank's shards
        return {**rest, "optimizer_states": []}

    def _map_file(self, path: Path) -> dict[str, Any]:
        whole = read_checkpoint(path, mmap=True)
        states = whole.get("optimizer_states", ())
        refuse_non_finite(path, whole["state_dict"], states, self.global_rank, self.world_size)
        return whole

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        if "state_dict" in checkpoint:
            assert self.lightning_module is not None
            load_model_state(self.lightning_module, checkpoint["state_dict"], strict)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=False):
            load_optimizer_state(_plain(optimizer), state)


def _plain(optimizer: Any) -> Optimizer:
    """The torch optimizer within Lightning's wrapper."""
    inner: Optimizer = getattr(optimizer, "_optimizer", optimizer)
    return inner


StrategyRegistry.register(
    "fsdp2", FSDP2Strategy, description="Fully sharded data parallelism (torch's fully_shard)", override=True
)
