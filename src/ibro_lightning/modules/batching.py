"""Cutting a rollout into optimizer steps, and steps into micro-batches that fit into memory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import get_args

import torch
from torch import Tensor

from ibro_lightning.errors import ConfigError
from ibro_lightning.experience import Experience
from ibro_lightning.functional import AggregationMode
from ibro_lightning.seeding import update_order


def mini_batches(groups: Tensor, prompts: int | None, seed: int, total: int | None = None) -> Iterator[Tensor]:
    """Rows of each optimizer step: ``prompts`` whole groups in random order; the last step may be smaller. A rank that
    has none of a step's groups gets no rows.

    Args:
        groups: ``[B]`` which group each row belongs to.
        prompts: groups per step; None means all.
        total: groups on all ranks; None: those that are here are all.
    """
    order = torch.tensor(update_order(seed, int(groups.max()) + 1 if total is None else total))
    for some in order.split(prompts or len(order)):
        yield torch.isin(groups.cpu(), some).nonzero().squeeze(-1)


def token_budget_batches(lengths: Sequence[int], budget: int, *, padded: bool = True) -> Iterator[Tensor]:
    """Rows of each micro-batch: sorted by length, so that little is padded, at most ``budget`` tokens each, balanced.

    As few micro-batches as the budget allows, and then as equal ones as possible: the budget is lowered as long as
    their number stays the same. A single sequence longer than the budget gets a micro-batch of its own. Losses are
    divided by the tokens of the whole step, so the cut changes memory and speed, never the gradient.

    Args:
        lengths: tokens of each row.
        padded: count rows as long as their micro-batch's longest; False (packing) counts the tokens alone.
    """
    order = sorted(range(len(lengths)), key=lambda row: lengths[row])
    count = len(_cut(order, lengths, budget, padded))
    low, high = 1, budget
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if len(_cut(order, lengths, middle, padded)) <= count else (middle + 1, high)
    for rows in _cut(order, lengths, high, padded):
        yield torch.tensor(rows)


def _cut(order: Sequence[int], lengths: Sequence[int], budget: int, padded: bool) -> list[list[int]]:
    """Greedily, in the given order of rising length."""
    batches: list[list[int]] = []
    tokens = 0
    for row in order:
        rows = len(batches[-1]) + 1 if batches else 1
        tokens = lengths[row] * rows if padded else tokens + lengths[row]
        if not batches or tokens > budget:
            batches.append([])
            tokens = lengths[row]
        batches[-1].append(row)
    return batches


def check_aggregation(mode: AggregationMode, max_tokens: int | None) -> None:
    """Raise :class:`ConfigError` for an unknown aggregation, or one without the number that it needs."""
    if mode not in get_args(AggregationMode):
        raise ConfigError("model.aggregation", mode, f"write one of {', '.join(get_args(AggregationMode))}")
    if mode != "seq-mean-token-sum-norm":
        return
    if max_tokens is None or max_tokens < 1:
        raise ConfigError(
            "model.aggregation_max_tokens", max_tokens, f"{mode} divides by a constant length: write data.sampling's"
        )


def weighted_sum(values: Tensor, micro: Experience) -> Tensor:
    """``Σ weights·x`` over the valid tokens of a micro-batch: its share of the step's aggregate."""
    assert micro.weights is not None, "ActorModule.begin_step sets the weights"
    if values.shape != micro.mask.shape:
        raise ValueError(f"losses and objectives are [B, T] = {list(micro.mask.shape)}, got {list(values.shape)}")
    return (torch.where(micro.mask, values, 0.0) * micro.weights).sum()


def losses_of(metrics: Mapping[str, float]) -> dict[str, float]:
    """Those of a step's metrics that are losses."""
    return {name: value for name, value in metrics.items() if name.endswith("loss")}


def rows_of(experience: Experience, rows: Tensor) -> Experience:
    """Some rows of the rollout; a rank that has none of a step takes part in it with a row that does not count."""
    if len(rows):
        return experience.select(rows)
    step = experience.select(rows.new_zeros(1))
    return replace(step, mask=torch.zeros_like(step.mask))
