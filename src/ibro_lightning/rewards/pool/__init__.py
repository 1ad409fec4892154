"""Worker processes for rewards: ``pool.py`` runs in the trainer, ``server.py`` in the process that forks workers."""

from ibro_lightning.rewards.pool.lost import Verdicts, joined
from ibro_lightning.rewards.pool.pool import RewardPool
from ibro_lightning.rewards.pool.pool_options import PoolOptions

__all__ = ["PoolOptions", "RewardPool", "Verdicts", "joined"]
