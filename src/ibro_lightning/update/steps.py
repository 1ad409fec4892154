"""Splits a rollout into optimizer steps, and steps into micro-batches that fit into memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ibro_lightning.batches.experience import Experience
from ibro_lightning.batches.sequences import Sequences
from ibro_lightning.errors import check_count
from ibro_lightning.guards.memory_advice import memory_advice
from ibro_lightning.ranks import ALONE, Ranks
from ibro_lightning.seeding import permutation


def mini_batches(groups: Tensor, prompts: int | None, seed: int, total: int | None = None) -> Iterator[Tensor]:
    """Rows of each optimizer step: ``prompts`` whole groups in random order; the last step may be smaller. A rank
    without groups of a step gets no rows.

    Args:
        groups: ``[B]`` the group of each row.
        prompts: groups per step; None means all.
        total: groups on all ranks; None: there are no others than these.
    """
    order = torch.tensor(permutation(int(groups.max()) + 1 if total is None else total, seed))
    for chosen in order.split(prompts or len(order)):
        yield torch.isin(groups.cpu(), chosen).nonzero().squeeze(-1)


def token_budget_batches(lengths: Sequence[int], budget: int, *, padded: bool = True) -> Iterator[Tensor]:
    """Rows of each micro-batch: sorted by length for little padding, as few as the budget allows, and balanced: the
    budget is lowered as long as their number stays the same. A sequence longer than the budget gets a micro-batch of
    its own. Losses are divided by the tokens of the whole step, so the split never changes the gradient.

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
    """Split greedily, in the given order of rising length."""
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


@dataclass(frozen=True)
class TokenBudget:
    """The tokens in memory at once: changes speed and memory, never the result.

    Args:
        tokens: of a micro-batch, padding included; a longer sequence gets a micro-batch of its own.
        packing: sequences are run without padding.
        checkpointing: activations are recomputed in the backward pass; for the advice when memory runs out.
    """

    tokens: int = 16384
    packing: bool = False
    checkpointing: bool = False

    def __post_init__(self) -> None:
        check_count("micro_batch_tokens", self.tokens, 1)

    def micro_batches(self, sequences: Sequences, ranks: Ranks = ALONE) -> list[tuple[Tensor, bool]]:
        """``(rows, counts)`` of equally many micro-batches on every rank, since all ranks run a sharded model at once.
        A rank with too few repeats its shortest row, which does not count."""
        device = sequences.input_ids.device
        cut = token_budget_batches(sequences.lengths.tolist(), self.tokens, padded=not self.packing)
        batches = [(rows.to(device), True) for rows in cut]
        most = int(ranks.max(torch.tensor(len(batches), device=device)))
        return batches + [(sequences.lengths.argmin()[None], False)] * (most - len(batches))

    def advice(self, phase: str, micro: Sequences) -> AbstractContextManager[None]:
        """The context of a micro-batch, which advises what to change if memory runs out in it."""
        device = micro.input_ids.device
        return memory_advice(
            phase, micro, self.tokens, packing=self.packing, checkpointing=self.checkpointing, device=device
        )


def rows_of(experience: Experience, rows: Tensor) -> Experience:
    """These rows of the rollout; a rank without any takes part in the step with a row that does not count."""
    if len(rows):
        return experience.select(rows)
    step = experience.select(rows.new_zeros(1))
    return replace(step, mask=torch.zeros_like(step.mask))


def with_scores(step: Experience, parts: Sequence[tuple[Tensor, Tensor, Tensor]]) -> Experience:
    """Add the old log-probs and entropies of a step's micro-batches, given as ``(rows, logp, entropy)``; without any,
    the step is unchanged."""
    if not parts:
        return step
    logp, entropy = (values.new_zeros(step.mask.shape) for values in parts[0][1:])  # [B, T]
    for rows, micro_logp, micro_entropy in parts:
        logp[rows, : micro_logp.shape[1]] = micro_logp
        entropy[rows, : micro_entropy.shape[1]] = micro_entropy
    return replace(step, old_logp=logp, old_entropy=entropy)
