"""Seeds of random numbers that belong to a response."""

from __future__ import annotations

import hashlib
from collections import Counter
from itertools import pairwise

import torch
from torch import Tensor

from ibro_lightning.batches.experience import Experience
from ibro_lightning.seeding import derive_seed, run_seed


def response_seeds(step: Experience, *counters: int | str) -> Tensor:
    """``[B]`` int64 on the CPU, a seed for each response: a function of the run's seed, the iteration, ``counters``,
    the number of the group and the response's tokens; of equal responses in a group, each has its own.

    So it depends neither on the order of the rows nor on how a rollout is split over ranks or into steps, all of which
    take whole groups.
    """
    ends, tokens = step.lengths.cumsum(0).tolist(), step.sequences.responses.cpu().numpy()
    seen, seeds = Counter[tuple[int, str]](), list[int]()
    for group, (start, end) in zip(step.groups.tolist(), pairwise([0, *ends]), strict=True):
        digest = hashlib.blake2b(tokens[start:end].tobytes(), digest_size=16).hexdigest()
        seen[group, digest] += 1
        seeds.append(derive_seed(run_seed(), *counters, step.iteration, group, digest, seen[group, digest]))
    return torch.tensor(seeds, dtype=torch.long)
