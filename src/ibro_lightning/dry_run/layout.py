"""How the ``trainer`` settings spread a run over devices, without building a Trainer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from lightning.fabric.connector import _convert_precision_to_unified_args
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh

from ibro_lightning.errors import ConfigError
from ibro_lightning.guards.machine import memory_bytes
from ibro_lightning.models import Sharding
from ibro_lightning.models.tensor_parallel import SETTING as TENSOR_PARALLEL
from ibro_lightning.strategies import FSDP2Strategy

GIB = 2**30
Kind = Literal["single", "ddp", "fsdp2"]


@dataclass(frozen=True)
class Layout:
    """The processes, one per device, and how the strategy distributes the weights.

    Args:
        device: "cpu" or "cuda".
        world: number of processes on all nodes.
        kind: of strategy.
        tensor_parallel: processes that share the arithmetic of one copy of the model, and see the same data.
        cpu_offload: shards, gradients and optimizer states are in host memory.
        reshard: ``reshard_after_forward`` of :class:`FSDP2Strategy`.
        precision: "32-true" or "bf16-mixed".
        memory: bytes of one device; None if unknown.
    """

    device: str = "cpu"
    world: int = 1
    kind: Kind = "single"
    tensor_parallel: int = 1
    cpu_offload: bool = False
    reshard: bool = True
    precision: str = "32-true"
    memory: int | None = None

    @classmethod
    def of(cls, trainer: Any, gib: float | None = None) -> Layout:
        """The layout that the ``trainer`` section of a recipe, classes instantiated, describes.

        Args:
            gib: memory of one device; None takes that of this machine's, if it has such devices.

        Raises:
            ConfigError: a setting is not supported, or depends on devices that this machine lacks.
        """
        device = {"gpu": "cuda"}.get(trainer.accelerator, trainer.accelerator)
        if device not in ("cpu", "cuda"):
            raise ConfigError("trainer.accelerator", trainer.accelerator, "a dry run cannot choose: write cpu or cuda")
        world = _devices(trainer.devices, device) * trainer.num_nodes
        kind, strategy = _kind(trainer.strategy, world)
        tensor_parallel = int(strategy._tensor_parallel_size) if strategy else 1
        if world % tensor_parallel:
            raise ConfigError(
                TENSOR_PARALLEL, tensor_parallel, f"it must divide the number of processes, which is {world}"
            )
        precision = "32-true" if trainer.precision is None else _convert_precision_to_unified_args(trainer.precision)
        if precision not in ("32-true", "bf16-mixed"):
            raise ConfigError("trainer.precision", trainer.precision, "not supported: write 32-true or bf16-mixed")
        return cls(
            device=device,
            world=world,
            kind=kind,
            tensor_parallel=tensor_parallel,
            cpu_offload=strategy is not None and strategy.cpu_offload,
            reshard=strategy is None or strategy.reshard_after_forward,
            precision=precision,
            memory=int(gib * GIB) if gib else _memory_here(device, world // trainer.num_nodes),
        )

    @property
    def data_parallel(self) -> int:
        """Ranks: processes that see different data."""
        return self.world // self.tensor_parallel

    @contextmanager
    def sharding(self) -> Iterator[Sharding | None]:
        """The sharding of networks, in a fake world of which only this process exists; None: not sharded."""
        if self.kind != "fsdp2":
            yield None
            return
        # torch's fake process group: collectives return at once and change nothing.
        from torch.testing._internal.distributed.fake_pg import FakeStore

        distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=self.world)
        try:
            sizes, names = (self.data_parallel, self.tensor_parallel), ("data_parallel", "tensor_parallel")
            mesh = init_device_mesh("cpu", sizes, mesh_dim_names=names)
            dtype = torch.bfloat16 if self.precision == "bf16-mixed" else None
            yield Sharding(mesh, torch.device("cpu"), dtype, reshard_after_forward=self.reshard)
        finally:
            distributed.destroy_process_group()

    def autocast(self) -> torch.autocast:
        """The autocast that Lightning's precision plugin puts around a training step."""
        return torch.autocast("cpu", torch.bfloat16, enabled=self.precision == "bf16-mixed", cache_enabled=False)

    def __str__(self) -> str:
        processes = f"{self.world} {self.device} processes" if self.world > 1 else f"one {self.device} process"
        parallel = f", tensor parallel {self.tensor_parallel}" if self.tensor_parallel > 1 else ""
        offload = ", offloaded to the CPU" if self.cpu_offload else ""
        return f"{processes}, {self.kind}{parallel}{offload}, {self.precision}"


def _devices(devices: Any, device: str) -> int:
    """Processes per node, for each of Lightning's spellings of ``trainer.devices``."""
    text = str(devices).strip()
    if isinstance(devices, list):
        return len(devices)
    if text in ("auto", "-1"):
        if device == "cpu":
            return 1
        if torch.cuda.device_count() == 0:
            raise ConfigError("trainer.devices", devices, "this machine has no GPU to count: write a number")
        return torch.cuda.device_count()
    if "," in text:
        return len([part for part in text.split(",") if part.strip()])
    if text.isdecimal() and int(text) > 0:
        return int(text)
    raise ConfigError("trainer.devices", devices, "write a number of devices")


def _kind(strategy: Any, world: int) -> tuple[Kind, FSDP2Strategy | None]:
    if isinstance(strategy, FSDP2Strategy):
        return "fsdp2", strategy
    if strategy == "fsdp2":
        return "fsdp2", FSDP2Strategy()
    if strategy in (None, "auto"):
        return ("single" if world == 1 else "ddp"), None
    if isinstance(strategy, DDPStrategy) or str(strategy).startswith("ddp"):
        return "ddp", None
    if isinstance(strategy, SingleDeviceStrategy):
        return "single", None
    name = strategy if isinstance(strategy, str) else type(strategy).__name__
    raise ConfigError("trainer.strategy", name, "not supported by a dry run: write auto, ddp or fsdp2")


def _memory_here(device: str, processes: int) -> int | None:
    """Bytes of one of this machine's devices; on the CPU, one process's share of the memory."""
    if device == "cpu":
        return memory_bytes() // processes
    return int(torch.cuda.get_device_properties(0).total_memory) if torch.cuda.device_count() else None
