"""Sources of an empty model's weights: safetensors files, of which each rank reads its own rows, or rank 0."""

from __future__ import annotations

import json
import pickle
from collections.abc import Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch
from safetensors import safe_open
from torch import Tensor, distributed, nn
from torch.distributed.tensor import DTensor
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file

from ibro_lightning.models.sharding import local_slices, named_parameters


def local_part(like: Tensor, value: Tensor) -> Tensor:
    """The part of the whole tensor ``value`` that corresponds to this rank's part of ``like``."""
    return value[local_slices(like)] if isinstance(like, DTensor) and value.ndim else value


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor.detach()


@dataclass
class WeightFiles:
    """Safetensors files: which file holds which weight."""

    files: Mapping[str, Path]
    zero: frozenset[str] = frozenset()
    """Weights that are in no file and start at 0: a new critic's head."""

    @property
    def names(self) -> Collection[str]:
        return self.files.keys()

    def shape(self, name: str) -> torch.Size:
        with safe_open(self.files[name], framework="pt") as file:
            return torch.Size(file.get_slice(name).get_shape())

    def dtype(self, name: str) -> str:
        """In safetensors' notation: F32, BF16, F8_E4M3, I32, …"""
        with safe_open(self.files[name], framework="pt") as file:
            return str(file.get_slice(name).get_dtype())

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        return self._read(name, (slice(start, stop),))

    @classmethod
    def find(cls, path: str, revision: str) -> WeightFiles | None:
        """The files of a folder or of a hub model, downloading them; None if there are none in this format."""
        common: dict[str, Any] = {"revision": revision, "_raise_exceptions_for_missing_entries": False}
        single = cached_file(path, SAFE_WEIGHTS_NAME, **common)
        if single is not None:
            with safe_open(single, framework="pt") as file:
                return cls(dict.fromkeys(file.keys(), Path(single)))
        index = cached_file(path, SAFE_WEIGHTS_INDEX_NAME, **common)
        if index is None:
            return None
        return cls(files_of(path, index, revision))

    def fits(self, model: nn.Module, may_lack: frozenset[str] = frozenset()) -> bool:
        """Whether the files hold every parameter of ``model`` in its shape, except those in ``may_lack``.

        False if they hold both of two tied parameters: which one counts is up to transformers.
        """
        ties: dict[str, list[str]] = {}
        shapes = self._shapes()
        for name, canonical, parameter in named_parameters(model):
            if name in self.files:
                ties.setdefault(canonical, []).append(name)
                if shapes[name] != parameter.shape:
                    return False
        required = {canonical for _, canonical, _ in named_parameters(model)} - may_lack
        buffers = set(model.state_dict()) - {name for name, _, _ in named_parameters(model)}
        return (
            required <= ties.keys() and buffers <= self.files.keys() and all(len(names) == 1 for names in ties.values())
        )

    def fill(self, name: str, tensor: Tensor) -> None:
        """Write the weight ``name`` (of the transformers model) into ``tensor``, or this rank's part of it."""
        local = _local(tensor)
        if name in self.zero:
            local.zero_()
        elif local.numel():
            slices = local_slices(tensor) if isinstance(tensor, DTensor) else ()
            local.copy_(self._read(name, slices))

    def buffers(self, model: nn.Module) -> dict[str, Tensor]:
        """Values of the model's buffers, on the CPU, by name."""
        kept = model.state_dict()
        return {
            name: self._read(name).to(buffer.dtype) if name in kept else buffer.detach().clone()
            for name, buffer in model.named_buffers()
        }

    def _shapes(self) -> dict[str, torch.Size]:
        shapes: dict[str, torch.Size] = {}
        for path in sorted(set(self.files.values())):
            with safe_open(path, framework="pt") as file:
                shapes |= {name: torch.Size(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
        return shapes

    def _read(self, name: str, slices: tuple[slice, ...] = ()) -> Tensor:
        # Opened each time: the parts of a mapped file that were read stay in memory until it is closed.
        with safe_open(self.files[name], framework="pt") as file:
            part: Tensor = file.get_slice(name)[slices or ...]
        return part


def files_of(path: str, index: str, revision: str) -> dict[str, Path]:
    """The weights that an index file lists, and the file of each."""
    shards = json.loads(Path(index).read_text())["weight_map"]
    paths = {name: cached_file(path, name, revision=revision) for name in sorted(set(shards.values()))}
    return {name: Path(str(paths[shard])) for name, shard in shards.items()}


class RankZero:
    """A model that rank 0 builds on its CPU, as a single process would; broadcasts one whole tensor at a time.

    Args:
        model: the model on rank 0, None elsewhere.
    """

    def __init__(self, model: nn.Module | None, device: torch.device) -> None:
        self._device, self._is_source = device, model is not None
        self._tensors: dict[str, Tensor] = {}
        if model is not None:
            self._tensors = dict(model.named_buffers()) | dict(model.named_parameters(remove_duplicate=False))

    def fill(self, name: str, tensor: Tensor) -> None:
        _local(tensor).copy_(local_part(tensor, self._receive(name, tensor.shape, tensor.dtype)))

    def buffers(self, model: nn.Module) -> dict[str, Tensor]:
        return {name: self._receive(name, buffer.shape, buffer.dtype).cpu() for name, buffer in model.named_buffers()}

    def _receive(self, name: str, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        if self._is_source:
            tensor = self._tensors.pop(name).detach().to(self._device, dtype).contiguous()
        else:
            tensor = torch.empty(shape, dtype=dtype, device=self._device)
        distributed.broadcast(tensor, src=0)
        return tensor


WeightSource: TypeAlias = WeightFiles | RankZero
"""Fills sharded tensors. Every rank requests the same names in the same order."""


def raise_on_all_ranks(attempt: Any) -> Any:
    """The result of ``attempt()``; if it raises on any rank, every rank raises the first rank's error.

    Without this, ranks would wait forever for one that has failed.
    """
    result, error = None, None
    try:
        result = attempt()
    except Exception as caught:
        error = caught
    errors: list[Exception | None] = [None] * distributed.get_world_size()
    distributed.all_gather_object(errors, _portable(error))
    for rank, first in enumerate(errors):
        if first is not None:  # this rank's own, with its traceback, if it is the first
            raise error if error is not None and rank == distributed.get_rank() else first
    return result


def _portable(error: Exception | None) -> Exception | None:
    with suppress(Exception):
        pickle.loads(pickle.dumps(error))
        return error
    return RuntimeError(f"{type(error).__name__}: {error}")
