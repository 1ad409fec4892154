"""Programs judged by unit tests, and the locked-down process in which they run."""

from ibro_lightning.rewards.code.reward import CodeReward
from ibro_lightning.rewards.code.sandbox import SandboxLimits, SandboxResult, run_python

__all__ = ["CodeReward", "SandboxLimits", "SandboxResult", "run_python"]
