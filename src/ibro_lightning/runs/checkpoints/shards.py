"""Checkpoints of ``torch.distributed.checkpoint`` (DCP) shards: tensors in its files, everything else in ``meta.pt``.

DCP reads other values than tensors with unrestricted pickle. Only tensors are requested here, so no code can run.
"""

from __future__ import annotations

import hashlib
import io
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystem, FileSystemWriter
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.optim import Optimizer

from ibro_lightning.runs.checkpoints.index import ShardReader, read_rest, write_rest
from ibro_lightning.runs.checkpoints.manifest import DIGEST, write_manifest
from ibro_lightning.runs.checkpoints.validity import check_fits

WEIGHT, OPTIMIZER = "weight", "optimizer"


class _DigestingFile(io.BufferedWriter):
    """A sequentially written file that computes its digest on the way, and is synced to disk when closed."""

    def __init__(self, raw: io.FileIO) -> None:
        super().__init__(raw)
        self.digest = hashlib.new(DIGEST)

    def write(self, data: Any) -> int:
        self.digest.update(data)
        return super().write(data)

    def fileno(self) -> int:
        self.flush()  # DCP calls this in order to sync, while the last bytes are still buffered
        return super().fileno()

    def close(self) -> None:
        try:
            if not self.closed:
                os.fsync(self.fileno())
        finally:
            super().close()


class _DigestingFileSystem(FileSystem):
    def __init__(self) -> None:
        self.digests: dict[str, str] = {}

    @contextmanager
    def create_stream(self, path: str | os.PathLike, mode: str) -> Iterator[Any]:
        if mode != "wb":
            with super().create_stream(path, mode) as stream:
                yield stream
            return
        with _DigestingFile(io.FileIO(path, "wb")) as file:
            yield file
        self.digests[Path(path).name] = file.digest.hexdigest()


class ShardWriter(FileSystemWriter):
    """DCP's writer, which also records the digests of the files that this process writes."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.fs: _DigestingFileSystem = _DigestingFileSystem()

    def everyones_digests(self) -> dict[str, str]:
        """The digests of all processes' files, by name. Collective: all ranks must call it."""
        if not distributed.is_initialized():
            return self.fs.digests
        gathered: list[Any] = [None] * distributed.get_world_size()
        distributed.all_gather_object(gathered, self.fs.digests)
        return {name: digest for digests in gathered for name, digest in digests.items()}


def save_shards(folder: Path, checkpoint: dict[str, Any], *, is_first: bool) -> None:
    """Write Lightning's ``checkpoint``, whose tensors are this rank's shards; the first rank writes what is the same on
    all of them. Collective: all ranks must call it."""
    folder.mkdir(parents=True, exist_ok=True)
    rest = {name: value for name, value in checkpoint.items() if name != "state_dict"}
    tensors, rest["optimizer_states"] = _split(checkpoint.get("optimizer_states", []))
    tensors |= {f"{WEIGHT}/{name}": value for name, value in checkpoint["state_dict"].items()}
    writer = ShardWriter(folder)
    with _errors_of(folder):
        save(tensors, storage_writer=writer)  # returns when all ranks are done
    digests = writer.everyones_digests()
    if is_first:
        write_rest(folder, rest)
        write_manifest(folder, digests)


def check_shards_fit(folder: Path, module: nn.Module) -> None:
    """:func:`.check_fits` for a folder; reads only the index."""
    saved = ShardReader(folder).tensors()
    weights = {name.removeprefix(f"{WEIGHT}/"): entry.size for name, entry in saved.items() if _is_weight(name)}
    check_fits(weights, module, folder)


def load_shards(folder: Path, module: nn.Module, optimizers: Sequence[Optimizer]) -> dict[str, Any]:
    """Load a module and its optimizers, however they are sharded, and return the rest of the checkpoint; each rank
    reads its own part. Raises :class:`ConfigError` for a checkpoint of another model."""
    check_shards_fit(folder, module)
    reader = ShardReader(folder)
    saved = reader.tensors()
    # state_dict() shares its memory with the module, so loading fills the module.
    tensors = {f"{WEIGHT}/{name}": value for name, value in module.state_dict().items()}
    parameters = [[p for group in optimizer.param_groups for p in group["params"]] for optimizer in optimizers]
    for key, entry in saved.items():
        if (position := _position(key)) is not None and position[0] < len(optimizers):
            like = parameters[position[0]][position[1]].detach()
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
    """Read the whole checkpoint on one process, in Lightning's format, with whole tensors on the CPU."""
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
    """Turn DCP's error, a ``BaseException`` with all ranks' tracebacks, into a ``RuntimeError`` of one cause."""
    try:
        yield
    except CheckpointException as error:
        rank, (cause, _) = next(iter(error.failures.items()))
        text = " ".join(str(cause).split())
        raise RuntimeError(f"the shards of {folder} on rank {rank}: {type(cause).__name__}: {text}") from cause


def read_optimizer_states(folder: Path) -> list[dict[str, Any]]:
    """Read the optimizers' states and settings; tensors with dimensions are on ``meta``."""
    tensors = {
        key: torch.empty(entry.size, dtype=entry.properties.dtype, device="meta")
        for key, entry in ShardReader(folder).tensors().items()
        if not _is_weight(key)
    }
    states: list[dict[str, Any]] = read_rest(folder)["optimizer_states"]
    _join(states, tensors)
    return states


def _split(states: Sequence[Mapping[str, Any]]) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    """Split optimizer states into tensors with dimensions, for DCP, and the rest, which is the same on all ranks."""
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
    """Undo :func:`_split`, in place."""
    for key, tensor in tensors.items():
        if (position := _position(key)) is not None:
            states[position[0]]["state"][position[1]][position[2]] = tensor


def _position(key: str) -> tuple[int, int, str] | None:
    """``(optimizer, parameter, name)`` for the key of an optimizer's tensor; None for weights."""
    if _is_weight(key):
        return None
    _, optimizer, parameter, name = key.split("/", maxsplit=3)
    return int(optimizer), int(parameter), name


def _is_weight(key: str) -> bool:
    return key.startswith(f"{WEIGHT}/")
