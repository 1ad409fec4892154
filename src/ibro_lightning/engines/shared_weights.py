"""Weights on their way to another process of this machine: in memory that both have mapped, and no pickle."""

from __future__ import annotations

import mmap
import os
import tempfile
from collections.abc import Iterable, Iterator
from typing import IO, Any

import torch
from torch import Tensor

Entry = tuple[str, str, list[int], int]
"""``(name, dtype, shape, offset in bytes)`` of a weight in the file."""
ALIGNMENT = 64
"""Bytes to whose multiples offsets are rounded up; the largest element has 16."""


def nameless_file() -> IO[bytes]:
    """A file in memory (elsewhere than on Linux: a temporary one) that is gone with the last process that has it open,
    however that ends. Nothing is ever left behind, and the size of /dev/shm is no limit."""
    if hasattr(os, "memfd_create"):
        return os.fdopen(os.memfd_create("ibro-weights"), "w+b")
    return tempfile.TemporaryFile()


def write(file: IO[Any], weights: Iterable[tuple[str, Tensor]]) -> list[Entry]:
    """Replace the file's content by ``weights``, taken one at a time; returns their table."""
    table: list[Entry] = []
    clear(file)
    for name, tensor in weights:
        file.write(bytes(-file.tell() % ALIGNMENT))
        table.append((name, str(tensor.dtype).removeprefix("torch."), list(tensor.shape), file.tell()))
        file.write(tensor.detach().contiguous().cpu().flatten().view(torch.uint8).numpy())
    file.flush()
    return table


def read(file: IO[Any], table: Iterable[Entry]) -> Iterator[tuple[str, Tensor]]:
    """Copies of the weights in the file, one at a time."""
    content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY) if os.fstat(file.fileno()).st_size else b""
    for name, dtype, shape, offset in table:
        count = torch.Size(shape).numel()
        kind = getattr(torch, dtype)
        flat = (
            torch.frombuffer(content, dtype=kind, count=count, offset=offset) if count else torch.empty(0, dtype=kind)
        )
        yield name, flat.view(shape).clone()  # the writer frees the content, and engines may keep a tensor


def clear(file: IO[Any]) -> None:
    """Free the memory of the content."""
    file.seek(0)
    file.truncate()
