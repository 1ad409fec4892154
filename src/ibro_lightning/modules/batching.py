"""Cutting a rollout into optimizer steps, and steps into micro-batches that fit into memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ibro_lightning.seeding import permutation


def mini_batches(groups: Tensor, prompts: int | None, seed: int) -> Iterator[Tensor]:
    """Rows of each optimizer step: ``prompts`` whole groups in random order; the last step may be smaller.

    Args:
        groups: ``[B]`` which group each row belongs to.
        prompts: groups per step; None means all.
    """
    order = torch.tensor(permutation(int(groups.max()) + 1, seed))
    for some in order.split(prompts or len(order)):
        yield torch.isin(groups.cpu(), some).nonzero().squeeze(-1)


def token_budget_batches(lengths: Sequence[int], budget: int) -> Iterator[Tensor]:
    """Rows of each micro-batch: sorted by length, so that little is padded, and at most ``budget`` padded tokens each.

    A single sequence longer than the budget gets a micro-batch of its own. Losses are divided by the tokens of the
    whole step, so the cut changes memory and speed, never the gradient.
    """
    rows: list[int] = []
    for row in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        if rows and lengths[row] * (len(rows) + 1) > budget:  # the newest row is the longest
            yield torch.tensor(rows)
            rows = []
        rows.append(row)
    if rows:
        yield torch.tensor(rows)
