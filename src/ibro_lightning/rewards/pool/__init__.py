"""Worker processes for rewards: ``pool.py`` is the trainer's side, ``server.py`` the one that forks workers."""

from ibro_lightning.rewards.pool.pool import PoolOptions, RewardPool

__all__ = ["PoolOptions", "RewardPool"]
