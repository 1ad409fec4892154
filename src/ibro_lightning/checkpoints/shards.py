"""Checkpoints of ``torch.distributed.checkpoint`` (DCP) shards: tensors in its files, all else in ``meta.pt``.

DCP unpickles its index, and values that are no tensors, with full pickle. Here the index may name only what an index
consists of, and only tensors are asked for: a checkpoint cannot run code.
"""

from __future__ import annotations

import io
import pickle
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.optim import Optimizer

from ibro_lightning.checkpoints.catalog import MANIFEST
from ibro_lightning.checkpoints.fits import check_fits
from ibro_lightning.run_folders import write_json

REST = "meta.pt"
"""Everything that is not a tensor of the model or of an optimizer; Lightning's name for it."""
WEIGHT, OPTIMIZER = "weight", "optimizer"

_INDEX_PARTS = {
    ("pathlib", "PosixPath"),
    ("pathlib", "WindowsPath"),
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    *(
        ("torch.distributed.checkpoint.metadata", name)
        for name in (
            "BytesStorageMetadata",
            "ChunkStorageMetadata",
            "Metadata",
            "MetadataIndex",
            "StorageMeta",
            "TensorProperties",
            "TensorStorageMetadata",
            "_MEM_FORMAT_ENCODING",
        )
    ),
}


class _IndexUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if not is_dtype and (module, name) not in _INDEX_PARTS:
            raise pickle.UnpicklingError(f"a checkpoint's index has no business with {module}.{name}")
        return super().find_class(module, name)


class ShardReader(FileSystemReader):
    """DCP's reader, with an index that cannot run code."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        metadata = _IndexUnpickler(io.BytesIO((Path(self.path) / ".metadata").read_bytes())).load()
        if not isinstance(metadata, Metadata):
            raise pickle.UnpicklingError("a checkpoint's index is something else")
        metadata.storage_meta = metadata.storage_meta or StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata

    def tensors(self) -> dict[str, TensorStorageMetadata]:
        """Every tensor's key, with its whole size and its dtype."""
        entries = self.read_metadata().state_dict_metadata
        return {key: entry for key, entry in entries.items() if isinstance(entry, TensorStorageMetadata)}


def save_shards(folder: Path, checkpoint: dict[str, Any], *, is_first: bool) -> None:
    """Write Lightning's ``checkpoint``, whose tensors are this process's parts, together with all other processes.

    Args:
        is_first: this process writes what all have.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rest = {name: value for name, value in checkpoint.items() if name != "state_dict"}
    tensors, rest["optimizer_states"] = _split(checkpoint.get("optimizer_states", []))
    tensors |= {f"{WEIGHT}/{name}": value for name, value in checkpoint["state_dict"].items()}
    with _errors_of(folder):
        save(tensors, storage_writer=FileSystemWriter(folder))  # returns when all processes are done
    if is_first:
        with (folder / REST).open("wb") as file:
            torch.save(rest, file)
        # The last file: without it, the folder is no checkpoint.
        sizes = {path.name: path.stat().st_size for path in sorted(folder.iterdir()) if path.name != MANIFEST}
        write_json(folder / MANIFEST, {"files": sizes})


def load_shards(folder: Path, module: nn.Module, optimizers: Sequence[Optimizer]) -> dict[str, Any]:
    """Fill a module and its optimizers, however they are sharded, each process with its own part.

    Returns:
        the rest of the checkpoint.

    Raises:
        ConfigError: it is of another model.
    """
    reader = ShardReader(folder)
    saved = reader.tensors()
    weights = {name.removeprefix(f"{WEIGHT}/"): entry.size for name, entry in saved.items() if _is_weight(name)}
    check_fits(weights, module, folder)
    # What state_dict() gives shares its memory with the module, so loading fills it.
    tensors = {f"{WEIGHT}/{name}": value for name, value in module.state_dict().items()}
    parameters = [[p for group in optimizer.param_groups for p in group["params"]] for optimizer in optimizers]
    for key, entry in saved.items():
        if (place := _place(key)) is not None and place[0] < len(optimizers):
            like = parameters[place[0]][place[1]].detach()
            tensors[key] = torch.zeros_like(like, dtype=entry.properties.dtype)
            if tensors[key].shape != entry.size:
                raise ValueError(f"{key} has the shape {list(entry.size)}, its parameter {list(like.shape)}")
    with _errors_of(folder):
        load(tensors, storage_reader=reader)
    rest = read_rest(folder)
    states = rest.pop("optimizer_states", [])
    _join(states, tensors)
    for optimizer, state in zip(optimizers, states, strict=False):
        optimizer.load_state_dict(state)
    return rest


def read_shards(folder: Path, *, with_optimizers: bool = True) -> dict[str, Any]:
    """The whole checkpoint on one process, in the form that Lightning knows, with whole tensors on the CPU."""
    reader = ShardReader(folder)
    tensors = {
        key: torch.empty(entry.size, dtype=entry.properties.dtype)
        for key, entry in reader.tensors().items()
        if with_optimizers or _is_weight(key)
    }
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*assuming the intent is to.*")
        with _errors_of(folder):
            load(tensors, storage_reader=reader, no_dist=True)
    checkpoint = read_rest(folder)
    checkpoint["state_dict"] = {key.removeprefix(f"{WEIGHT}/"): t for key, t in tensors.items() if _is_weight(key)}
    _join(checkpoint["optimizer_states"], tensors)
    return checkpoint


@contextmanager
def _errors_of(folder: Path) -> Iterator[None]:
    """DCP raises what is no ``Exception``, with a traceback of every process: here it is one, and the first cause."""
    try:
        yield
    except CheckpointException as error:
        rank, (cause, _) = next(iter(error.failures.items()))
        said = " ".join(str(cause).split())
        raise RuntimeError(f"the shards of {folder} on rank {rank}: {type(cause).__name__}: {said}") from cause


def read_rest(folder: Path) -> dict[str, Any]:
    """Everything but the weights and the tensors of the optimizers."""
    rest: dict[str, Any] = torch.load(folder / REST, map_location="cpu", weights_only=True)
    return rest


def _split(states: Sequence[Mapping[str, Any]]) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    """Optimizer states, taken apart: tensors with a shape for DCP; counters, which all processes have, and settings."""
    tensors: dict[str, Tensor] = {}
    rest = []
    for number, state in enumerate(states):
        small: dict[int, dict[str, Any]] = {}
        for parameter, values in state["state"].items():
            large = {name: value for name, value in values.items() if isinstance(value, Tensor) and value.ndim}
            tensors |= {f"{OPTIMIZER}/{number}/{parameter}/{name}": value for name, value in large.items()}
            small[parameter] = {name: value for name, value in values.items() if name not in large}
        rest.append({**state, "state": small})
    return tensors, rest


def _join(states: Sequence[dict[str, Any]], tensors: Mapping[str, Tensor]) -> None:
    """Put the tensors back among the counters, in place."""
    for key, tensor in tensors.items():
        if (place := _place(key)) is not None:
            states[place[0]]["state"][place[1]][place[2]] = tensor


def _place(key: str) -> tuple[int, int, str] | None:
    """``(optimizer, parameter, name)`` of an optimizer's tensor; None for weights."""
    if _is_weight(key):
        return None
    _, optimizer, parameter, name = key.split("/", maxsplit=3)
    return int(optimizer), int(parameter), name


def _is_weight(key: str) -> bool:
    return key.startswith(f"{WEIGHT}/")
