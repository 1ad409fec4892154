"""Noise on advantages: how much a method needs them to be right."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ibro_lightning.batches.experience import Experience
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
    mask, lengths = step.mask, step.lengths
    advantages = torch.where(mask, step.advantages, 0.0).double()  # [N]
    spread = ranks.mean((advantages - ranks.mean(advantages, mask)).square(), mask).sqrt()
    row = step.per_token(torch.arange(len(step), device=mask.device))  # [N]
    highest, lowest = (
        advantages.new_full((len(step),), start).scatter_reduce_(0, row[mask], advantages[mask], reduce=reduce)
        for start, reduce in ((-torch.inf, "amax"), (torch.inf, "amin"))
    )  # [B] each
    position = torch.arange(len(mask), device=mask.device) - step.per_token(lengths.cumsum(0) - lengths)  # [N]
    counter = position.masked_fill(step.per_token(highest <= lowest), 0)  # [N]
    seeds = response_seeds(step, "advantage noise", purpose).repeat_interleave(lengths.cpu())  # [N]
    draws = counter_normals(seeds, counter.cpu()).to(mask.device)  # on the CPU: the same on every device
    return torch.where(mask, noise * spread * draws, 0.0).to(step.advantages.dtype)


def with_noise(step: Experience, noise: float, ranks: Ranks) -> Experience:
    """The rollout with noise on its advantages; without any, ``step`` itself. Collective."""
    if not noise:
        return step
    return replace(step, advantages=step.advantages + advantage_noise(step, noise, ranks, "advantage"))
