"""Rollouts whose sampler scored its tokens otherwise than the trainer does."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from helpers.flat import flat
from helpers.models import TinyQwen2
from helpers.rollouts import GROUPS, TEMPERATURE, make_rollout, reference_scores
from ibro_lightning.batches import Rollout

ORDER = sorted(range(8), key=lambda row: GROUPS[row])


@cache
def scores() -> list[tuple[np.ndarray, np.ndarray]]:
    """(log-probs, entropies) of each response of the rollout, one unpadded sequence at a time."""
    of_rows = reference_scores(TinyQwen2().model, TEMPERATURE)
    return [of_rows[row] for row in ORDER]


LENGTHS = make_rollout().sequences.response_lengths


def noise(seed: int, size: float) -> Tensor:
    """``[N]``."""
    wide = size * torch.randn(8, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return flat(wide, LENGTHS)


def rollout_of(sampler_logp: Tensor, **settings: Any) -> Rollout:
    """The rollout of the other tests, from a sampler that says so, ``[N]``."""
    return replace(make_rollout(**settings), sampler_logp=sampler_logp)


SHIFTS = [0.05, 0.3, 0.9, -0.15, 0.5, 0.02, -1.0, 0.15]


def sampler_near(logp: Tensor) -> Tensor:
    """``SHIFTS`` below ``logp``, and spread around that."""
    spread = [row - row.mean() for row in noise(3, 0.4).split(LENGTHS.tolist())]
    return logp - torch.cat([row + shift for row, shift in zip(spread, SHIFTS, strict=True)])
