"""``trainer.strategy: fsdp2``: weights, gradients and optimizer states spread over all ranks."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import timedelta
from typing import Any

import torch
from lightning.pytorch.strategies import StrategyRegistry
from torch import Tensor, distributed
from torch.optim import Optimizer

from ibro_lightning.errors import ConfigError
from ibro_lightning.models import Sharding
from ibro_lightning.strategies.saving import ShardedCheckpoints
from ibro_lightning.strategies.states import (
    full_model_state,
    full_optimizer_state,
    load_model_state,
    load_optimizer_state,
)

SETTING = "trainer.strategy.init_args"
PRECISIONS = {"32-true": None, "bf16-mixed": torch.bfloat16}


class FSDP2Strategy(ShardedCheckpoints):
    """Fully sharded data parallelism (``torch.distributed.fsdp.fully_shard``), on GPUs (NCCL) and on CPUs (gloo).

    Networks are sharded as they are built (``build_policy(..., sharding=strategy.sharding)``); Lightning moves and
    initialises nothing. Checkpoints are written and read by all ranks together.

    Args:
        tensor_parallel_size: ranks that share the arithmetic of each decoder block and see the same data; they should
            be on one machine. Data-parallel ranks: the world's size divided by it.
        cpu_offload: shards, gradients and optimizer states stay in the CPU's memory: slow, for models that do not fit.
        reshard_after_forward: free gathered weights after the forward pass; False keeps them until the backward pass,
            which takes more memory and less communication.
        save_distributed_checkpoint: write a folder to which every rank adds its shards (DCP), for large models. False
            writes one file, as every other strategy does, which all of them can load.
        timeout: how long a rank waits for another.
        process_group_backend: None takes nccl on GPUs and gloo on CPUs.
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
        if tensor_parallel_size < 1:
            raise ConfigError(f"{SETTING}.tensor_parallel_size", tensor_parallel_size, "write 1 or more")
        if timeout <= timedelta(0):
            raise ConfigError(f"{SETTING}.timeout", str(timeout), "write a positive time, such as 00:30:00")
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
            raise ConfigError(
                f"{SETTING}.tensor_parallel_size", size, f"it must divide the number of processes, which is {world}"
            )
        self._data_parallel_size = world // size
        super().setup_environment()

    @property
    def sharding(self) -> Sharding | None:
        """How networks are to be built; None before the processes have met."""
        if self._device_mesh is None:
            return None
        dtype = PRECISIONS[str(self.precision_plugin.precision)]
        return Sharding(self._device_mesh, self.root_device, dtype, self.cpu_offload, self.reshard_after_forward)

    def _get_process_group_backend(self) -> str:
        backend = super()._get_process_group_backend()
        # Offloaded shards are gathered and saved from where they are, which NCCL cannot do.
        return "cpu:gloo,cuda:nccl" if self.cpu_offload and backend == "nccl" else backend

    def model_to_device(self) -> None:
        """Move what was not built sharded; offloaded shards stay where they are."""
        if not self.cpu_offload:
            super().model_to_device()
            return
        assert self.lightning_module is not None
        for module in self.lightning_module.modules():
            for name, buffer in module.named_buffers(recurse=False):
                module._buffers[name] = buffer.to(self.root_device)
        self.lightning_module._device = self.root_device  # what .to() would have set

    def reduce(self, tensor: Any, group: Any = None, reduce_op: Any = "mean") -> Tensor:
        """Over the data-parallel ranks, unless a group is given: tensor-parallel ones have seen the same data."""
        if group is None and self._device_mesh is not None:
            group = self._device_mesh["data_parallel"].get_group()
        return super().reduce(tensor, group, reduce_op)

    def reduce_boolean_decision(self, decision: bool, all: bool = True) -> bool:
        """Over all ranks: what one of them cannot do, its tensor-parallel neighbours cannot either."""
        votes = torch.tensor(int(decision), device=self.root_device)
        distributed.all_reduce(votes)
        return int(votes) == self.world_size if all else bool(votes)

    # A checkpoint that is one file is gathered, and handed out, one tensor at a time; one that is a folder is not.

    @property
    def lightning_restore_optimizer(self) -> bool:
        return True

    def lightning_module_state_dict(self) -> dict[str, Any]:
        if self._save_distributed_checkpoint:
            return super().lightning_module_state_dict()
        assert self.lightning_module is not None
        return full_model_state(self.lightning_module)

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        if self._save_distributed_checkpoint:
            return super().optimizer_state(optimizer)
        return full_optimizer_state(getattr(optimizer, "_optimizer", optimizer))

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        if "state_dict" in checkpoint:
            assert self.lightning_module is not None
            load_model_state(self.lightning_module, checkpoint["state_dict"], strict)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=False):
            load_optimizer_state(getattr(optimizer, "_optimizer", optimizer), state)


StrategyRegistry.register(
    "fsdp2", FSDP2Strategy, description="Fully sharded data parallelism (torch's fully_shard)", override=True
)
