"""Whitening over the tokens of the whole rollout, on all ranks."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from ibro_lightning.batches.experience import Experience
from ibro_lightning.batches.ragged import row_wise
from ibro_lightning.functional import masked_whiten
from ibro_lightning.ranks import Ranks


def whiten(values: Tensor, experience: Experience, ranks: Ranks) -> Tensor:
    """``[N]`` with mean 0 and variance 1 over the rollout's valid tokens on all ranks; 0 elsewhere. The variance is
    less than 1 where the whole rollout is right or wrong and the values hardly differ (``docs/rewards.md``)."""
    mask = experience.mask
    mean = ranks.mean(values, mask)
    variance = ranks.mean((values - mean).square_(), mask)
    whiten_rows = partial(
        masked_whiten, mean=mean, variance=variance, least_variance=_least_variance(experience, ranks)
    )
    # Some rows at a time, since it computes in float64.
    return row_wise(lambda _, __, rows, counts: whiten_rows(rows, counts), experience.lengths, values, mask)[0]


def _least_variance(experience: Experience, ranks: Ranks) -> Tensor:
    """``(span / 2)²`` if no two responses of the rollout, on all ranks, differ in their outcomes; otherwise 0."""
    outcomes, span = experience.outcomes, experience.outcome_span
    zero = experience.advantages.new_zeros((), dtype=torch.float64)
    if outcomes is None:
        return zero
    verified = ~outcomes.isnan() & (not experience.placeholder)  # [B]
    spans = torch.ones_like(outcomes) if span is None else span  # [B]
    differ = ranks.largest(outcomes, verified) > -ranks.largest(-outcomes, verified)
    widest = ranks.largest(spans, torch.full_like(verified, not experience.placeholder))
    return torch.where(differ, zero, (widest / 2) ** 2)
