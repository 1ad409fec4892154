"""Verifiers of mathematical answers: the published rule of DAPO, and symbolic comparison by math-verify."""

from ibro_lightning.rewards.mathematics.dapo_reward import DapoMathReward, dapo_score
from ibro_lightning.rewards.mathematics.symbolic import MathVerifyReward, math_verify_score

__all__ = ["DapoMathReward", "MathVerifyReward", "dapo_score", "math_verify_score"]
