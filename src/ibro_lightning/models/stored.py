"""Weights in a model folder: inspected a few rows at a time, without loading a model."""

from __future__ import annotations

import zipfile
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any, ClassVar, TypeAlias

import torch
from huggingface_hub import get_safetensors_metadata
from torch import Tensor
from transformers.utils import WEIGHTS_INDEX_NAME, WEIGHTS_NAME, cached_file

from ibro_lightning.errors import PICKLED, is_unpickling
from ibro_lightning.models.weight_files import WeightFiles, files_of

PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")
"""Suffixes of files that are usually pickled."""


def stored_weights(path: str, revision: str) -> StoredWeights | None:
    """The weights of a folder or hub model in one of the formats that transformers reads; None if there are none."""
    return WeightFiles.find(path, revision) or TorchFiles.find(path, revision)


def names_on_hub(path: str, revision: str) -> Collection[str] | None:
    """The names in the headers of a hub model's safetensors files, without downloading them; None if unavailable."""
    try:
        return get_safetensors_metadata(path, revision=revision).weight_map.keys()
    except Exception:  # no connection, offline mode, another format: local files decide
        return None


def pickled(path: str, error: Exception) -> str | None:
    """The remedy for weights that are not read because they are pickled; None if ``error`` has another cause. Pickles
    of tensors alone are read under transformers' file names."""
    if is_unpickling(error):
        files = sorted(file.name for file in Path(path).glob("pytorch_model*.bin"))
        return f"{files[0]}: {PICKLED}" if files else PICKLED
    if "no file named" not in str(error):
        return None
    if not (others := sorted(file.name for file in Path(path).glob("*") if file.suffix in PICKLES)):
        return None
    return (
        f"it holds no model.safetensors, only {', '.join(others[:3])}, whose format can carry any code and is not "
        "read: ask for a revision in safetensors, or have whoever made the file convert it"
    )


class TorchFiles:
    """Weights written by torch.save, mapped into memory and read on access; members as of :class:`WeightFiles`."""

    _DTYPES: ClassVar = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.float64: "F64"}

    def __init__(self, files: Iterable[Path]) -> None:
        self._tensors: dict[str, Tensor] = {}
        for file in files:
            mappable = zipfile.is_zipfile(file)  # torch.save has written zip files since 1.6
            self._tensors |= torch.load(file, map_location="cpu", mmap=mappable, weights_only=True)

    @classmethod
    def find(cls, path: str, revision: str) -> TorchFiles | None:
        """See :meth:`WeightFiles.find`."""
        common: dict[str, Any] = {"revision": revision, "_raise_exceptions_for_missing_entries": False}
        single = cached_file(path, WEIGHTS_NAME, **common)
        if single is not None:
            return cls([Path(single)])
        index = cached_file(path, WEIGHTS_INDEX_NAME, **common)
        return None if index is None else cls(set(files_of(path, index, revision).values()))

    @property
    def names(self) -> Collection[str]:
        return self._tensors.keys()

    def shape(self, name: str) -> torch.Size:
        return self._tensors[name].shape

    def dtype(self, name: str) -> str:
        return self._DTYPES.get(self._tensors[name].dtype, str(self._tensors[name].dtype))

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        return self._tensors[name][start:stop]


StoredWeights: TypeAlias = WeightFiles | TorchFiles
"""Weights in files: names, shapes and dtypes without reading them, rows on demand."""
