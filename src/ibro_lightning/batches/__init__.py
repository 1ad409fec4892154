"""The data of an iteration, as tensors: sequences, a rollout, and the experience that an update reads."""

from ibro_lightning.batches.experience import Experience, MicroBatch, TokenStats
from ibro_lightning.batches.rollout_batch import Rollout, collate_rollout
from ibro_lightning.batches.sequences import FlatSequences, Sequences, to_device

__all__ = [
    "Experience",
    "FlatSequences",
    "MicroBatch",
    "Rollout",
    "Sequences",
    "TokenStats",
    "collate_rollout",
    "to_device",
]
