"""The data of an iteration, as tensors: sequences, a rollout, and the experience that an update reads."""

from ibro_lightning.batches.experience import Experience, TokenStats
from ibro_lightning.batches.rollout_batch import Rollout, collate_rollout
from ibro_lightning.batches.sequences import Sequences, to_device

__all__ = ["Experience", "Rollout", "Sequences", "TokenStats", "collate_rollout", "to_device"]
