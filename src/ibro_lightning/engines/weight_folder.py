"""Weights on their way to a server: a private folder of safetensors files, written a part at a time."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from ibro_lightning.guards.disk import disk_errors

FILE_BYTES = 2**30
"""Size at which the next file begins, which bounds the memory that writing takes."""


@contextmanager
def private_folder(parent: str | None) -> Iterator[Path]:
    """The absolute path of a new folder that only this user may read (mode 0700), in ``parent`` or the system's
    temporary folder; removed at the end."""
    folder = Path(tempfile.mkdtemp(prefix="ibro-weights-", dir=parent)).absolute()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def write_weights(weights: Iterable[tuple[str, Tensor]], folder: Path, limit: int = FILE_BYTES) -> None:
    """Write weights to ``folder`` in files of about ``limit`` bytes, each weight in its own dtype.

    Tied weights are written under each of their names. Raises :class:`DiskFullError`.
    """
    part: dict[str, Tensor] = {}
    size = number = 0
    for name, tensor in weights:
        # A copy, because safetensors refuses weights that share memory, and gathered ones may be reused.
        part[name] = tensor.detach().to("cpu", copy=True).contiguous()
        size += tensor.nbytes
        if size >= limit:
            _write(part, folder, number)
            part, size, number = {}, 0, number + 1
    if part:
        _write(part, folder, number)


def _write(part: dict[str, Tensor], folder: Path, number: int) -> None:
    path = folder / f"weights-{number:05d}.safetensors"
    with disk_errors(path):
        save_file(part, path)
