"""Verifiers and reward shaping. A reward is ``(prompt, completions) → RewardResult`` with named parts."""

from ibro_lightning.rewards.base import Judge, PlainResponses, Request, Reward, Verdict, VerifiableReward, score
from ibro_lightning.rewards.code import CodeReward, SandboxLimits
from ibro_lightning.rewards.combine import RewardByPart, RewardSum, judge_all, judge_here
from ibro_lightning.rewards.gold_trial import GoldTrial
from ibro_lightning.rewards.mathematics import DapoMathReward, MathVerifyReward, dapo_score, math_verify_score
from ibro_lightning.rewards.mathematics.perturbed import perturbed
from ibro_lightning.rewards.overlong import OverlongPenalty
from ibro_lightning.rewards.pool import PoolOptions, RewardPool
from ibro_lightning.rewards.text import LastNumberReward, last_number

__all__ = [
    "CodeReward",
    "DapoMathReward",
    "GoldTrial",
    "Judge",
    "LastNumberReward",
    "MathVerifyReward",
    "OverlongPenalty",
    "PlainResponses",
    "PoolOptions",
    "Request",
    "Reward",
    "RewardByPart",
    "RewardPool",
    "RewardSum",
    "SandboxLimits",
    "Verdict",
    "VerifiableReward",
    "dapo_score",
    "judge_all",
    "judge_here",
    "last_number",
    "math_verify_score",
    "perturbed",
    "score",
]
