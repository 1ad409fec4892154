"""How Lightning's Trainer writes and reads checkpoints here: streamed to disk, read by tensors alone."""

from __future__ import annotations

import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io.checkpoint_io import CheckpointIO

from ibro_lightning.checkpoints.catalog import REFUSED, why_invalid
from ibro_lightning.checkpoints.shards import read_rest, read_shards
from ibro_lightning.errors import ConfigError

ABOUT = "ibro_lightning"
"""The part of a checkpoint that says what run it is of."""


class CheckpointFiles(CheckpointIO):
    """A Trainer plugin: reads both forms of a checkpoint on one process or in DDP, and writes files.

    Args:
        weights_alone: leave out optimizers, loops and callbacks when reading.
    """

    def __init__(self, weights_alone: bool = False) -> None:
        self.weights_alone = weights_alone

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Stream to disk, in contrast to Lightning's, which first builds a copy of it all in memory."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())

    def load_checkpoint(
        self, path: str | Path, map_location: Any = "cpu", weights_only: bool | None = None
    ) -> dict[str, Any]:
        """What Lightning restores from. Always with ``weights_only``, whatever is asked for.

        Raises:
            ConfigError: it is no checkpoint, damaged, or holds something other than tensors and plain values.
        """
        path = Path(path)
        whole = read_checkpoint(path, with_optimizers=not self.weights_alone)
        if not self.weights_alone:
            return whole
        return {name: whole[name] for name in ("state_dict", "pytorch-lightning_version") if name in whole}

    def remove_checkpoint(self, path: str | Path) -> None:
        """For a user's own ``ModelCheckpoint``; ours removes by itself."""
        path = Path(path)
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def read_checkpoint(path: Path, *, with_optimizers: bool = True, mmap: bool = False) -> dict[str, Any]:
    """A whole checkpoint, file or folder, on this process.

    Raises:
        ConfigError: see :meth:`CheckpointFiles.load_checkpoint`.
    """
    with _refusing(path):
        if path.is_dir():
            return read_shards(path, with_optimizers=with_optimizers)
        checkpoint: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
        return checkpoint


def read_about(path: Path) -> dict[str, Any]:
    """Everything but the tensors, cheaply: of a file they are only mapped.

    Raises:
        ConfigError: see :meth:`CheckpointFiles.load_checkpoint`.
    """
    with _refusing(path):
        if path.is_dir():
            return read_rest(path)
        checkpoint: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        return {name: value for name, value in checkpoint.items() if name not in ("state_dict", "optimizer_states")}


class _refusing:
    """Turns what can go wrong with a checkpoint into one line."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        if isinstance(error, pickle.UnpicklingError):
            reason = REFUSED
        elif isinstance(error, OSError | EOFError | RuntimeError | ValueError | LookupError):
            reason = why_invalid(self.path) or f"it cannot be read: {' '.join(str(error).split())[:200]}"
        else:
            return
        raise ConfigError("ckpt_path", str(self.path), reason) from error
