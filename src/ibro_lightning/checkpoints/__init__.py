"""Checkpoints on disk: which ones there are, which are whole, and what is in them, whoever wrote them.

Two forms, both named ``iteration_000020.ckpt``: a *file*, as ``torch.save`` writes it, with whole weights; and a
*folder* of ``torch.distributed.checkpoint`` shards. Either can be read by any strategy on any number of processes.
Optimizer states are keyed by the position of the parameter in its own optimizer, which is the same everywhere.
"""

from ibro_lightning.checkpoints.catalog import (
    checkpoint_name,
    checkpoints_in,
    iteration_of,
    newest_valid,
    why_invalid,
)
from ibro_lightning.checkpoints.fits import check_fits
from ibro_lightning.checkpoints.plugin import ABOUT, CheckpointFiles, read_about, read_checkpoint
from ibro_lightning.checkpoints.shards import load_shards, save_shards

__all__ = [
    "ABOUT",
    "CheckpointFiles",
    "check_fits",
    "checkpoint_name",
    "checkpoints_in",
    "iteration_of",
    "load_shards",
    "newest_valid",
    "read_about",
    "read_checkpoint",
    "save_shards",
    "why_invalid",
]
