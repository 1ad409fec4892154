"""Worker processes for rewards: ``pool.py`` runs in the trainer, ``server.py`` in the process that forks workers."""

from ibro_lightning.rewards.pool.lost import Verdicts, joined
from ibro_lightning.rewards.pool.options import PoolOptions
from ibro_lightning.rewards.pool.pool import RewardPool

__all__ = ["PoolOptions", "RewardPool", "Verdicts", "joined"]
