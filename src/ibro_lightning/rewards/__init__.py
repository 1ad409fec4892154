"""Verifiers and reward shaping. A reward is ``(prompt, completions) → RewardResult`` with named parts."""

from ibro_lightning.rewards.base import Judge, Reward, Verdict, VerifiableReward, score
from ibro_lightning.rewards.code import CodeReward, SandboxLimits
from ibro_lightning.rewards.combine import RewardByPart, RewardSum, judge_here
from ibro_lightning.rewards.gym import ReasoningGymReward
from ibro_lightning.rewards.mathematics import DapoMathReward, MathVerifyReward, dapo_score, math_verify_score
from ibro_lightning.rewards.number_path import NumberPathReward
from ibro_lightning.rewards.pool import PoolOptions, RewardPool
from ibro_lightning.rewards.shaping import OverlongPenalty
from ibro_lightning.rewards.text import CountdownReward, LastNumberReward, last_number

__all__ = [
    "CodeReward",
    "CountdownReward",
    "DapoMathReward",
    "Judge",
    "LastNumberReward",
    "MathVerifyReward",
    "NumberPathReward",
    "OverlongPenalty",
    "PoolOptions",
    "ReasoningGymReward",
    "Reward",
    "RewardByPart",
    "RewardPool",
    "RewardSum",
    "SandboxLimits",
    "Verdict",
    "VerifiableReward",
    "dapo_score",
    "judge_here",
    "last_number",
    "math_verify_score",
    "score",
]
