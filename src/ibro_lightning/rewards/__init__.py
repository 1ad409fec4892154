"""Verifiers and reward shaping. A reward is ``(prompt, completions) → RewardResult`` with named parts."""

from ibro_lightning.rewards.base import Judge, Reward, Verdict, VerifiableReward, score
from ibro_lightning.rewards.combine import RewardByPart, RewardSum, judge_here
from ibro_lightning.rewards.dapo import DapoMathReward, dapo_score
from ibro_lightning.rewards.number_path import NumberPathReward
from ibro_lightning.rewards.pool import PoolOptions, RewardPool
from ibro_lightning.rewards.shaping import OverlongPenalty
from ibro_lightning.rewards.symbolic import MathVerifyReward, math_verify_score
from ibro_lightning.rewards.text import CountdownReward, LastNumberReward, last_number

__all__ = [
    "CountdownReward",
    "DapoMathReward",
    "Judge",
    "LastNumberReward",
    "MathVerifyReward",
    "NumberPathReward",
    "OverlongPenalty",
    "PoolOptions",
    "Reward",
    "RewardByPart",
    "RewardPool",
    "RewardSum",
    "Verdict",
    "VerifiableReward",
    "dapo_score",
    "judge_here",
    "last_number",
    "math_verify_score",
    "score",
]
