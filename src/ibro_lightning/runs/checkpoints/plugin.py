"""Checkpoint I/O for Lightning's Trainer: streamed to disk, and read with ``weights_only``."""

from __future__ import annotations

import os
import pickle
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io.checkpoint_io import CheckpointIO

from ibro_lightning.errors import ConfigError
from ibro_lightning.guards.finite import why_not_finite
from ibro_lightning.runs.checkpoints.index import read_all_but_tensors
from ibro_lightning.runs.checkpoints.keeping import remove_checkpoint
from ibro_lightning.runs.checkpoints.shards import read_optimizer_states, read_shards
from ibro_lightning.runs.checkpoints.validity import REFUSED, why_invalid, why_known_invalid


class CheckpointFiles(CheckpointIO):
    """A Trainer plugin for one process or DDP: reads both forms of a checkpoint and writes files.

    Args:
        weights_alone: do not read optimizers, loops and callbacks.
    """

    def __init__(self, weights_alone: bool = False) -> None:
        self.weights_alone = weights_alone

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Stream to disk; Lightning's own plugin first serialises everything in memory."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())

    def load_checkpoint(
        self, path: str | Path, map_location: Any = "cpu", weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read what Lightning restores from, always with ``weights_only``, whatever the argument. Every rank reads the
        whole checkpoint, so all refuse alike.

        Raises:
            ConfigError: it is not a checkpoint, is damaged, or holds NaN or anything but tensors and plain values.
        """
        path = Path(path)
        if (reason := why_known_invalid(path)) is not None:
            raise ConfigError("ckpt_path", str(path), reason)
        checkpoint = read_checkpoint(path, with_optimizers=not self.weights_alone)
        optimizers = () if self.weights_alone else checkpoint.get("optimizer_states", ())
        refuse_non_finite(path, checkpoint["state_dict"], optimizers)
        if not self.weights_alone:
            return checkpoint
        return {name: checkpoint[name] for name in ("state_dict", "pytorch-lightning_version") if name in checkpoint}

    def remove_checkpoint(self, path: str | Path) -> None:
        """For a user's own ``ModelCheckpoint``; :class:`.IterationCheckpoint` does not call this."""
        remove_checkpoint(Path(path))


def read_checkpoint(path: Path, *, with_optimizers: bool = True, mmap: bool = False) -> dict[str, Any]:
    """Read a whole checkpoint, file or folder, on this process."""
    with refusing(path):
        if path.is_dir():
            return read_shards(path, with_optimizers=with_optimizers)
        checkpoint: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
        return checkpoint


def read_about(path: Path) -> dict[str, Any]:
    """Read everything but the tensors, cheaply: a file's tensors are only memory-mapped."""
    with refusing(path):
        return read_all_but_tensors(path)


def read_optimizers(path: Path) -> list[dict[str, Any]]:
    """Read the states of all optimizers, cheaply: a file's tensors are memory-mapped, a folder's are on ``meta``."""
    with refusing(path):
        if path.is_dir():
            return read_optimizer_states(path)
        states: list[dict[str, Any]] = torch.load(path, map_location="cpu", weights_only=True, mmap=True).get(
            "optimizer_states", []
        )
        return states


def refuse_non_finite(
    path: Path, weights: Mapping[str, Any], optimizers: Sequence[Mapping[str, Any]], share: int = 0, shares: int = 1
) -> None:
    """Raise :class:`ConfigError` for what :func:`.why_not_finite` finds."""
    if (reason := why_not_finite(weights, optimizers, share, shares)) is not None:
        raise ConfigError(
            "ckpt_path",
            str(path),
            f"{reason}, so it is unusable. Move it out of the folder, then --ckpt_path last takes the one before it; a "
            "lower model.learning_rate may prevent this",
        )


@contextmanager
def refusing(path: Path) -> Iterator[None]:
    """Turn errors while reading a checkpoint into a :class:`ConfigError` of one line."""
    try:
        yield
    except (ConfigError, torch.OutOfMemoryError):  # already one line, or not the checkpoint's fault
        raise
    except pickle.UnpicklingError as error:
        raise ConfigError("ckpt_path", str(path), REFUSED) from error
    except (OSError, EOFError, RuntimeError, ValueError, LookupError) as error:
        reason = why_invalid(path) or f"it cannot be read: {' '.join(str(error).split())[:200]}"
        raise ConfigError("ckpt_path", str(path), reason) from error
