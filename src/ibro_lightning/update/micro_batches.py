"""Splits an optimizer step into micro-batches that fit into memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ibro_lightning.batches.sequences import FlatSequences, Sequences
from ibro_lightning.errors import check_count
from ibro_lightning.guards.memory_advice import memory_advice
from ibro_lightning.ranks import ALONE, Ranks


def token_budget_batches(lengths: Sequence[int], budget: int, *, padded: bool = True) -> Iterator[Tensor]:
    """Rows of each micro-batch: sorted by length for little padding, as few as the budget allows, and balanced: the
    budget is lowered as long as their number stays the same. A sequence longer than the budget gets a micro-batch of
    its own. Losses are divided by the tokens of the whole step, so the split never changes the gradient.

    Args:
        lengths: tokens of each row.
        padded: count rows as long as their micro-batch's longest; False (packing) counts the tokens alone.
    """
    order = sorted(range(len(lengths)), key=lambda row: lengths[row])

    def tokens(rows: Sequence[int], before: int) -> int:
        return lengths[rows[-1]] * len(rows) if padded else before + lengths[rows[-1]]

    return _balanced(order, tokens, budget)


def shared_prompt_batches(
    prompts: Sequence[int], prompt_lengths: Sequence[int], response_lengths: Sequence[int], budget: int
) -> Iterator[Tensor]:
    """:func:`token_budget_batches` where a micro-batch counts each of its distinct prompts once and each response,
    without padding: rows with the same prompt stay together, those groups first whose longest response is shortest.

    Args:
        prompts: equal numbers for rows with the same prompt.
        prompt_lengths, response_lengths: tokens of each row.
    """
    longest: dict[int, int] = {}
    for prompt, length in zip(prompts, response_lengths, strict=True):
        longest[prompt] = max(longest.get(prompt, 0), length)

    def place(row: int) -> tuple[int, int, int]:
        return longest[prompts[row]], prompts[row], response_lengths[row]

    def tokens(rows: Sequence[int], before: int) -> int:
        row, is_new = rows[-1], len(rows) == 1 or prompts[rows[-2]] != prompts[rows[-1]]
        return before + response_lengths[row] + prompt_lengths[row] * is_new

    return _balanced(sorted(range(len(prompts)), key=place), tokens, budget)


Tokens = Callable[[Sequence[int], int], int]
"""The tokens of a micro-batch's rows, given those before its last row was added."""


def _balanced(order: Sequence[int], tokens: Tokens, budget: int) -> Iterator[Tensor]:
    """Split in this order, with the smallest budget that gives as few micro-batches."""
    count = len(_cut(order, tokens, budget))
    low, high = 1, budget
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if len(_cut(order, tokens, middle)) <= count else (middle + 1, high)
    for rows in _cut(order, tokens, high):
        yield torch.tensor(rows)


def _cut(order: Sequence[int], tokens: Tokens, budget: int) -> list[list[int]]:
    """Split greedily, in the given order."""
    batches: list[list[int]] = [[]]
    count = 0
    for row in order:
        batches[-1].append(row)
        count = tokens(batches[-1], count)
        if count > budget and len(batches[-1]) > 1:
            batches.append([batches[-1].pop()])
            count = tokens(batches[-1], 0)
    return [rows for rows in batches if rows]


@dataclass(frozen=True)
class TokenBudget:
    """The tokens in memory at once: changes speed and memory, never the result.

    Args:
        tokens: of a micro-batch, padding included; a longer sequence gets a micro-batch of its own. For a network that
            shares prompts: of its distinct prompts and its responses, without padding.
        packing: sequences are run without padding.
        checkpointing: activations are recomputed in the backward pass; for the advice when memory runs out.
    """

    tokens: int = 16384
    packing: bool = False
    checkpointing: bool = False

    def __post_init__(self) -> None:
        check_count("micro_batch_tokens", self.tokens, 1)

    def micro_batches(
        self, sequences: FlatSequences | Sequences, ranks: Ranks = ALONE, network: nn.Module | None = None
    ) -> list[tuple[Tensor, bool]]:
        """``(rows, counts)`` of equally many micro-batches on every rank, since all ranks run a sharded model at once.
        A rank with too few repeats its shortest row, which does not count.

        Args:
            network: to be run over them; it may share prompts (:attr:`.ResponseNetwork.shares_prompts`).
        """
        device = sequences.device
        if shares_prompts(network):
            lengths = sequences.prompt_lengths.tolist(), sequences.response_lengths.tolist()
            cut = shared_prompt_batches(sequences.same_prompts(), *lengths, self.tokens)
        else:
            cut = token_budget_batches(sequences.lengths.tolist(), self.tokens, padded=not self.packing)
        batches = [(rows.to(device), True) for rows in cut]
        most = int(ranks.max(torch.tensor(len(batches), device=device)))
        return batches + [(sequences.lengths.argmin()[None], False)] * (most - len(batches))

    def advice(self, phase: str, micro: Sequences, network: nn.Module | None = None) -> AbstractContextManager[None]:
        """The context of a micro-batch, which advises what to change if memory runs out in it."""
        return memory_advice(
            phase,
            micro,
            self.tokens,
            packing=self.packing,
            sharing=shares_prompts(network),
            checkpointing=self.checkpointing,
            device=micro.input_ids.device,
        )


def shares_prompts(network: nn.Module | None) -> bool:
    """Whether a network runs each distinct prompt of a micro-batch once; one of another kind than ours does not."""
    return bool(getattr(network, "shares_prompts", False))
