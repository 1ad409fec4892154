"""Clip-Cov and KL-Cov (arXiv 2505.22617): exclude, or hold back, the few tokens that make entropy collapse.

Both look at ``c_t = (A_t − Ā)(log π_t − mean log π)``, means over the valid tokens of the optimizer step. The log-probs
are those before the update, so that the choice of tokens does not depend on micro-batches; the authors' code takes
the current ones, which are equal in the first step of a rollout.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from ibro_lightning.batches.experience import Experience, TokenStats
from ibro_lightning.errors import ConfigError, is_number
from ibro_lightning.regularizers.base import PolicyLossMethod, StepContext
from ibro_lightning.regularizers.coefficients import Coefficient, TrackedNumber, as_coefficient, moving
from ibro_lightning.regularizers.method import Method


def token_covariance(step: Experience, context: StepContext) -> Tensor:
    """``c_t [N]``: how much a token adds to the covariance of advantage and log-prob."""
    assert step.old_logp is not None
    centred = [values - context.ranks.mean(values, step.mask) for values in (step.advantages, step.old_logp)]
    return centred[0] * centred[1]


class ClipCov(PolicyLossMethod):
    """A few random tokens with high ``c_t`` get no policy gradient.

    Args:
        fraction: their share of the step's valid tokens; at least one if any is eligible.
        low: tokens with ``low < c_t < high`` are eligible.
        high: see ``low``.
    """

    method = Method(
        formula="a few random tokens of those with 1 < (A − Ā)(log π − mean log π) < 5 get no policy gradient",
        source="arXiv 2505.22617",
        certainty="code read",
        recipe="regularizer: {class_path: ClipCov, init_args: {fraction: 2.0e-4, low: 1.0, high: 5.0}}",
    )
    prepare_needs_scores = True
    zero_without_advantage = True

    def __init__(self, fraction: float = 2e-4, low: float = 1.0, high: float = 5.0) -> None:
        super().__init__()
        check_fraction(fraction)
        if not is_number(high) or math.isnan(high):
            raise ConfigError("high", high, "write a number")
        if not (is_number(low) and low < high):
            raise ConfigError("low", low, f"write a number below high ({high})")
        self.fraction, self.low, self.high = fraction, low, high

    def prepare(self, step: Experience, context: StepContext) -> Experience:
        covariance = token_covariance(step, context)
        eligible = ((covariance > self.low) & (covariance < self.high) & step.mask).nonzero().squeeze(-1)
        generator = torch.Generator().manual_seed(context.seed % 2**63)
        counts = context.ranks.gather(len(eligible))
        before = sum(counts[: context.ranks.rank])  # all ranks draw from the eligible tokens of all ranks
        drawn = torch.randperm(sum(counts), generator=generator)[: count_of(step.mask, self.fraction, context)]
        chosen = drawn[(drawn >= before) & (drawn < before + len(eligible))] - before
        left_out = torch.zeros_like(step.mask)
        left_out[eligible[chosen.to(eligible.device)]] = True
        return step.with_extra(clip_cov=left_out)

    def shape_policy_loss(self, loss: Tensor, stats: TokenStats) -> Tensor:
        return torch.where(stats.extra["clip_cov"], 0.0, loss)


class KLCov(PolicyLossMethod):
    """The tokens with the highest ``c_t`` pay ``kl_coef·|log π − log π_old|`` for moving.

    In a rollout's first optimizer step nothing has moved yet: the penalty is 0, and its gradient has the sign of a
    rounding error. It acts only with several steps per rollout (``mini_batch_prompts``, ``update_epochs``).

    Args:
        fraction: their share of the step's valid tokens; at least one.
        kl_coef: β of the penalty, a number or a coefficient.
    """

    method = Method(
        formula="the tokens whose A and log π vary together most pay kl_coef·|log r|",
        source="arXiv 2505.22617",
        certainty="code read",
        recipe="regularizer: {class_path: KLCov, init_args: {fraction: 2.0e-3, kl_coef: 1.0}}",
    )
    prepare_needs_scores = True
    acts_in_first_step = False

    def __init__(self, fraction: float = 2e-3, kl_coef: Coefficient | float = 1.0) -> None:
        super().__init__()
        check_fraction(fraction)
        self.fraction, self.kl_coef = fraction, as_coefficient(kl_coef, "kl_coef", "entropy")

    @property
    def coefficients(self) -> Mapping[str, TrackedNumber]:
        return {**super().coefficients, **moving(kl_coef=self.kl_coef)}

    def prepare(self, step: Experience, context: StepContext) -> Experience:
        return step.with_extra(kl_cov=top_tokens(token_covariance(step, context), step, self.fraction, context))

    def shape_policy_loss(self, loss: Tensor, stats: TokenStats) -> Tensor:
        penalty = self.kl_coef.value * (stats.logp - stats.old_logp).abs()
        return loss + torch.where(stats.extra["kl_cov"], penalty, 0.0)


def top_tokens(values: Tensor, step: Experience, fraction: float, context: StepContext) -> Tensor:
    """``[N]`` bool: that share of the step's valid tokens, on all ranks, which has the largest ``values``.

    The first tokens of a group's responses share one state, so equal values are common, and rounding, which depends on
    how the step is split, must not choose between them: values that agree to 0.001 count as equal, and among these the
    first groups and rows are chosen.
    """
    rounded = values.round(decimals=3).masked_fill(~step.mask, -torch.inf)
    chosen = torch.zeros_like(step.mask)
    chosen[context.ranks.top(rounded, count_of(step.mask, fraction, context), step.per_token(step.groups))] = True
    return chosen


def count_of(mask: Tensor, fraction: float, context: StepContext) -> int:
    """``fraction`` of the valid tokens of all ranks, at least one if there is any."""
    tokens = int(context.ranks.sum(mask.sum()))
    return min(tokens, max(1, int(tokens * fraction)))


def check_fraction(fraction: float, name: str = "fraction") -> None:
    if not (is_number(fraction) and 0 < fraction <= 1):
        raise ConfigError(name, fraction, "write a share of the tokens, above 0 and up to 1")
