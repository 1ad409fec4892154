"""Counter-based seeds: every random number is a function of *where* in the run it is needed, never of what ran before.

There is no generator state to save, so a rollout can be repeated bit for bit, a resumed run continues exactly where it
stopped, and random numbers do not depend on how samples are batched or spread over ranks. The idea is nanochat's; the
hash is SplitMix64 (Steele, Lea & Flood, *Fast Splittable Pseudorandom Number Generators*, OOPSLA 2014).
"""

from __future__ import annotations

import hashlib
import math
import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor  # reward workers import this file without torch

_GOLDEN_GAMMA = -7046029254386353131  # 0x9E3779B97F4A7C15 as a signed 64-bit integer
_MIX_1 = -4658895280553007687  # 0xBF58476D1CE4E5B9
_MIX_2 = -7723592293110705685  # 0x94D049BB133111EB


def run_seed() -> int:
    """The run's seed, as recorded by Lightning's ``seed_everything``; 0 if that was not called."""
    return int(os.environ.get("PL_GLOBAL_SEED", "0"))


def derive_seed(run_seed: int, *counters: int | str) -> int:
    """A 63-bit seed from the run's seed and any counters, e.g. ``derive_seed(seed, "sample", iteration, prompt, i)``.

    Counters are hashed with their types and lengths, so ``(1, 23)``, ``(12, 3)`` and ``("1", 23)`` all differ.
    """
    text = "".join(f"{type(part).__name__}:{len(str(part))}:{part}" for part in (run_seed, *counters))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def counter_uniforms(seeds: Tensor, counter: int | Tensor) -> Tensor:
    """One uniform number in [0, 1) per seed for draw number ``counter``.

    Args:
        seeds: ``[B]`` int64, one per sample (see :func:`derive_seed`).
        counter: number of the draw; in sampling, the index of the token in the response. An int64 tensor ``[B]`` has
            one per seed.

    Returns:
        ``[B]`` float64 with 52 random bits. Never rounds up to 1, so a product with a total stays below the total.
    """
    # int64 arithmetic wraps around in torch, as SplitMix64 requires; only shifts need care, as they are arithmetic.
    step = (counter + 1) * _GOLDEN_GAMMA
    z = seeds + (_wrap(step) if isinstance(step, int) else step)
    z = (z ^ _logical_shift_right(z, 30)) * _MIX_1
    z = (z ^ _logical_shift_right(z, 27)) * _MIX_2
    z = z ^ _logical_shift_right(z, 31)
    return _logical_shift_right(z, 12).double() * 2.0**-52


def counter_normals(seeds: Tensor, counter: int | Tensor) -> Tensor:
    """One draw from the standard normal distribution per seed, by Box and Muller's transform of the uniform draws
    ``2·counter`` and ``2·counter + 1`` (:func:`counter_uniforms`).

    Returns:
        ``[B]`` float64.
    """
    radius = (-2.0 * (1.0 - counter_uniforms(seeds, 2 * counter)).log()).sqrt()
    return radius * (2.0 * math.pi * counter_uniforms(seeds, 2 * counter + 1)).cos()


def permutation(size: int, seed: int) -> list[int]:
    """A random order of ``range(size)`` that depends on ``seed`` alone (and not on torch's global generator)."""
    import torch

    return torch.randperm(size, generator=torch.Generator().manual_seed(seed)).tolist()


def update_seed(run_seed: int, iteration: int, epoch: int) -> int:
    """Seed of the :func:`permutation` in which pass ``epoch`` over the rollout of ``iteration`` visits its groups.
    Optimizer steps take consecutive slices of it, so ranks that take every ``size``-th group have equally many groups
    in each step."""
    return derive_seed(run_seed, "mini-batches", iteration, epoch)


def _logical_shift_right(values: Tensor, bits: int) -> Tensor:
    return (values >> bits) & ((1 << (64 - bits)) - 1)


def _wrap(value: int) -> int:
    """``value`` modulo 2^64, as the signed 64-bit integer that torch accepts."""
    return (value + 2**63) % 2**64 - 2**63
