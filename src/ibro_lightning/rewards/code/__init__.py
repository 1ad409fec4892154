"""Programs judged by unit tests, in a locked-down process."""

from ibro_lightning.rewards.code.limits import SandboxLimits
from ibro_lightning.rewards.code.reward import CodeReward

__all__ = ["CodeReward", "SandboxLimits"]
