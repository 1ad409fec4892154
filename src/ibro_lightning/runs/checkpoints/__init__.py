"""Checkpoints on disk: which exist, which are valid, and what they contain.

There are two forms, both named ``iteration_000020.ckpt``: a *file* written by ``torch.save``, with whole weights; and a
*folder* of ``torch.distributed.checkpoint`` shards. Any strategy reads either, on any number of processes. Optimizer
states are keyed by the parameter's position in its own optimizer, which does not depend on the strategy.
"""

from ibro_lightning.runs.checkpoints.catalog import (
    Written,
    checkpoint_name,
    checkpoints_in,
    iteration_of,
    newer_valid,
    newest_valid,
)
from ibro_lightning.runs.checkpoints.index import ABOUT
from ibro_lightning.runs.checkpoints.keeping import Keeper, remove_checkpoint
from ibro_lightning.runs.checkpoints.plugin import (
    CheckpointFiles,
    read_about,
    read_checkpoint,
    read_optimizers,
    refuse_non_finite,
    refusing,
)
from ibro_lightning.runs.checkpoints.shards import check_shards_fit, load_shards, save_shards
from ibro_lightning.runs.checkpoints.validity import check_fits, check_limits, why_invalid, why_known_invalid

__all__ = [
    "ABOUT",
    "CheckpointFiles",
    "Keeper",
    "Written",
    "check_fits",
    "check_limits",
    "check_shards_fit",
    "checkpoint_name",
    "checkpoints_in",
    "iteration_of",
    "load_shards",
    "newer_valid",
    "newest_valid",
    "read_about",
    "read_checkpoint",
    "read_optimizers",
    "refuse_non_finite",
    "refusing",
    "remove_checkpoint",
    "save_shards",
    "why_invalid",
    "why_known_invalid",
]
