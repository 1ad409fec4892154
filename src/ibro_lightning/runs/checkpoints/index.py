"""The index of a sharded checkpoint (``.metadata``): its tensors, and where their parts are.

DCP reads its index with unrestricted pickle. Here only the classes of an index may be unpickled, so it cannot run code.
"""

from __future__ import annotations

import io
import os
import pickle
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata

ABOUT = "ibro_lightning"
"""The key under which a checkpoint describes its run."""
REST = "meta.pt"
"""The file (named as in Lightning) with everything but the tensors of the model and the optimizers."""

_METADATA = (
    *("BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta", "TensorProperties"),
    *("TensorStorageMetadata", "_MEM_FORMAT_ENCODING"),
)
_INDEX_PARTS = {
    *(("pathlib", name) for name in ("PosixPath", "WindowsPath")),
    *(("torch", "Size"), ("torch.serialization", "_get_layout")),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    *(("torch.distributed.checkpoint.metadata", name) for name in _METADATA),
}


class _IndexUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if not is_dtype and (module, name) not in _INDEX_PARTS:
            raise pickle.UnpicklingError(f"a checkpoint's index may not contain {module}.{name}")
        return super().find_class(module, name)


class ShardReader(FileSystemReader):
    """DCP's reader, with a restricted unpickler for the index."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        metadata = _IndexUnpickler(io.BytesIO((Path(self.path) / ".metadata").read_bytes())).load()
        if not isinstance(metadata, Metadata):
            raise pickle.UnpicklingError("this is not a checkpoint's index")
        metadata.storage_meta = metadata.storage_meta or StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata

    def tensors(self) -> dict[str, TensorStorageMetadata]:
        """Every tensor's key, with its global size and dtype."""
        entries = self.read_metadata().state_dict_metadata
        return {key: entry for key, entry in entries.items() if isinstance(entry, TensorStorageMetadata)}


def read_rest(folder: Path) -> dict[str, Any]:
    """Read everything but the weights and the optimizers' tensors."""
    rest: dict[str, Any] = torch.load(folder / REST, map_location="cpu", weights_only=True)
    return rest


def write_rest(folder: Path, rest: dict[str, Any]) -> None:
    """Write what :func:`read_rest` reads, and sync it to disk."""
    with (folder / REST).open("wb") as file:
        torch.save(rest, file)
        file.flush()
        os.fsync(file.fileno())


def read_all_but_tensors(path: Path) -> dict[str, Any]:
    """Read everything but the tensors of either form, cheaply: a file's tensors are only memory-mapped."""
    if path.is_dir():
        return read_rest(path)
    checkpoint: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    return {name: value for name, value in checkpoint.items() if name not in ("state_dict", "optimizer_states")}
