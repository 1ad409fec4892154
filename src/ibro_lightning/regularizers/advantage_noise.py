"""Noise on advantages: how much a method needs them to be right."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ibro_lightning.batches.experience import Experience
from ibro_lightning.batches.ragged import row_wise
from ibro_lightning.batches.response_seeds import response_seeds
from ibro_lightning.ranks import Ranks
from ibro_lightning.seeding import counter_normals


def advantage_noise(step: Experience, noise: float, ranks: Ranks, purpose: str) -> Tensor:
    """``[N]`` normal draws of ``noise`` standard deviations, to be added to a rollout's advantages, or a step's; 0 on
    tokens that take no part in the loss. Collective.

    The standard deviation is that of the advantages themselves over the valid tokens of all ranks, as in the curve
    ``advantage/std``; where all advantages are equal it is 0, and so is the noise.

    **One draw per number.** A response whose valid tokens have one and the same advantage, as in DAPO, gets one draw;
    any other, as with a critic, gets one for each token. A draw is a function of the run's seed, the iteration, the
    response and the token's position (:func:`.response_seeds`): every pass over a rollout has the same.

    Args:
        noise: standard deviations, 0 or more.
        purpose: another one has other draws.
    """
    spread = ranks.mean((step.advantages - ranks.mean(step.advantages, step.mask)).square_(), step.mask).sqrt()
    seeds = response_seeds(step, "advantage noise", purpose)  # [B]

    def draws(rows: Tensor, _: Tensor, advantages: Tensor, valid: Tensor) -> Tensor:  # of some rows, [b, t]
        if not valid.numel():  # responses that a deadline left empty
            return advantages
        lowest = advantages.masked_fill(~valid, torch.inf).amin(dim=1, keepdim=True)  # [b, 1]
        highest = advantages.masked_fill(~valid, -torch.inf).amax(dim=1, keepdim=True)
        one_number = (highest <= lowest).cpu()
        position = torch.arange(valid.shape[1]).expand(valid.shape).masked_fill(one_number, 0)
        normal = counter_normals(seeds[rows.cpu()][:, None], position)  # on the CPU: the same on every device
        return torch.where(valid, noise * spread * normal.to(valid.device), 0.0).to(advantages.dtype)

    # Some rows at a time, since it computes in float64.
    return row_wise(draws, step.lengths, step.advantages, step.mask)[0]


def with_noise(step: Experience, noise: float, ranks: Ranks) -> Experience:
    """The rollout with noise on its advantages; without any, ``step`` itself. Collective."""
    if not noise:
        return step
    return replace(step, advantages=step.advantages + advantage_noise(step, noise, ranks, "advantage"))
