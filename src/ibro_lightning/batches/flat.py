"""A batch as one row: no padding, and each distinct prompt once, however many responses follow it.

What a model computes token by token (embeddings, norms, projections, feed-forward layers) it computes over this row.
Attention needs each token's own sequence: :class:`Part` says how padded sequences are made from the row's tokens, and
which of their results go back into it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Self

import torch
from torch import Tensor

from ibro_lightning.batches.sequences import Sequences

WASTE = 1.3
"""Padded tokens over tokens, at most, in the rows of one call of attention."""


@dataclass(frozen=True)
class Part:
    """Sequences of similar length, whose attention is computed in one call, padded right to ``[b, t]`` queries and
    ``[b, l]`` keys."""

    queries: Tensor
    """``[b, t]`` the place of each query in the flat row; 0 on padding."""
    keys: Tensor
    """``[b, l]`` the places of the sequence from its first token on."""
    before: Tensor | None
    """``[b]`` keys before a sequence's first query; None: the queries are the whole sequence."""
    kept: Tensor
    """``[n]`` places in ``b · t`` of the results that are the flat row's, in its order."""

    def is_causal(self, window: int | None) -> bool:
        """Whether :meth:`mask` is the plain causal one, which a kernel may know by itself."""
        return self.before is None and (window is None or window >= self.keys.shape[1])

    def mask(self, window: int | None) -> Tensor:
        """``[1 or b, 1, t, l]`` bool: the keys that each query sees, of the last ``window`` ones if that is given. No
        query is without a key, so padding gives numbers, which are not used."""
        steps = torch.arange(self.queries.shape[1], device=self.keys.device)[:, None]  # [t, 1]
        places = torch.arange(self.keys.shape[1], device=self.keys.device)  # [l]
        offsets = steps.new_zeros(1) if self.before is None else self.before
        own = offsets[:, None, None, None] + steps  # [b, 1, t, 1] the query's own place among the keys; on padding, too
        own = own.clamp(max=len(places) - 1)
        seen = places <= own
        return seen if window is None else seen & (places > own - window)


@dataclass(frozen=True)
class FlatBatch:
    """The tokens of a batch in one row ``[N]``: see the module."""

    tokens: Tensor
    """``[N]`` token ids."""
    positions: Tensor
    """``[N]`` each token's position in its sequence."""
    parts: tuple[Part, ...]
    """Their kept results follow each other in the order of the row."""
    prompt_places: Tensor
    """``[B]`` the place of each sequence's first prompt token."""
    response_places: Tensor
    """``[B]`` the place of each sequence's first response token."""
    windows: set[int | None] = field(default_factory=set)
    """The windows that attention layers have asked for."""

    @classmethod
    def of(cls, sequences: Sequences) -> Self:
        """Flatten a batch, which may be padded on either side."""
        device, on_cpu = sequences.input_ids.device, sequences.to("cpu")
        firsts = on_cpu.same_prompts()
        prompts, responses = on_cpu.prompt_lengths.tolist(), on_cpu.response_lengths.tolist()
        repeated = sum(prompts) - sum(prompts[row] for row in set(firsts))
        build = _Builder(on_cpu, device)
        if repeated > sum(responses):  # prompts ask once; the responses ask with a mask
            build.add_prompts(sorted(set(firsts), key=prompts.__getitem__))
            build.add_responses(sorted(range(len(firsts)), key=responses.__getitem__), firsts)
        else:  # prompts ask again with each response, and a causal kernel needs no mask
            lengths = [prompt + response for prompt, response in zip(prompts, responses, strict=True)]
            build.add_sequences(sorted(range(len(firsts)), key=lengths.__getitem__), firsts)
        tokens, positions = torch.cat(build.tokens).to(device), torch.cat(build.positions).to(device)
        places = build.prompt_places.to(device), build.response_places.to(device)
        return cls(tokens, positions, tuple(build.parts), *places)

    def predicting(self, sequences: Sequences, *, after_last: bool = False) -> Tensor:
        """The places whose states predict the response tokens, in row order: that of the prompt's last token, then
        those of all but the last response token (``after_last``: of all)."""
        steps = torch.arange(sequences.max_response_length + 1, device=self.tokens.device)  # [T + 1]
        places = self.response_places[:, None] + steps - 1  # [B, T + 1]
        places[:, 0] = self.prompt_places + sequences.prompt_lengths - 1
        return places[steps < (sequences.response_lengths + after_last)[:, None]]

    def places(self, sequences: Sequences) -> Tensor:
        """The place of each of the batch's tokens, in row order: the tokens where ``attention_mask`` is 1."""
        steps = sequences.position_ids  # [B, L]
        in_prompt = steps < sequences.prompt_lengths[:, None]
        after = self.response_places[:, None] + steps - sequences.prompt_lengths[:, None]
        return torch.where(in_prompt, self.prompt_places[:, None] + steps, after)[sequences.attention_mask.bool()]


class _Builder:
    """Appends parts, and with them their tokens. Works on the CPU, and moves what a part needs to ``device``."""

    def __init__(self, sequences: Sequences, device: torch.device) -> None:
        self.sequences, self.device = sequences, device
        self.tokens: list[Tensor] = []
        self.positions: list[Tensor] = []
        self.parts: list[Part] = []
        self.prompt_places = torch.zeros(len(sequences), dtype=torch.long)
        self.response_places = torch.zeros(len(sequences), dtype=torch.long)
        self.count = 0

    def add_sequences(self, order: Sequence[int], firsts: Sequence[int]) -> None:
        """Whole sequences; a prompt belongs to the first that asks with it."""
        owners: dict[int, int] = {}
        for rows in _similar(order, self.sequences.lengths.tolist()):
            asked = torch.tensor([owners.setdefault(firsts[row], row) == row for row in rows])
            chosen, lengths = torch.tensor(rows), self.sequences.lengths[rows]
            prompts = self.sequences.prompt_lengths[rows]
            own_prompts = torch.where(asked, prompts, 0)
            starts = self._append(chosen, prompts - own_prompts, lengths)  # [b] of the first token that is kept
            self.prompt_places[chosen] = starts
            self.response_places[chosen] = starts + own_prompts
            owning = torch.tensor([owners[firsts[row]] for row in rows])
            self.prompt_places[chosen] = self.prompt_places[owning]
            keys = self._keys(chosen)
            self._add(keys, keys, None, self._kept(keys, prompts - own_prompts, lengths))

    def add_prompts(self, order: Sequence[int]) -> None:
        """The prompts of these rows, which differ."""
        for rows in _similar(order, self.sequences.prompt_lengths.tolist()):
            chosen, lengths = torch.tensor(rows), self.sequences.prompt_lengths[rows]
            self.prompt_places[chosen] = self._append(chosen, torch.zeros_like(lengths), lengths)
            keys = self.prompt_places[chosen][:, None] + torch.arange(int(lengths.max()))
            keys = keys.where(torch.arange(keys.shape[1]) < lengths[:, None], 0)
            self._add(keys, keys, None, self._kept(keys, torch.zeros_like(lengths), lengths))

    def add_responses(self, order: Sequence[int], firsts: Sequence[int]) -> None:
        """Responses to prompts that are there already."""
        for rows in _similar(order, self.sequences.response_lengths.tolist()):
            chosen, lengths = torch.tensor(rows), self.sequences.response_lengths[rows]
            prompts = self.sequences.prompt_lengths[rows]
            self.prompt_places[chosen] = self.prompt_places[torch.tensor([firsts[row] for row in rows])]
            self.response_places[chosen] = self._append(chosen, prompts, prompts + lengths)
            steps = torch.arange(int(lengths.max()))
            queries = (self.response_places[chosen][:, None] + steps).where(steps < lengths[:, None], 0)
            same = bool((prompts == prompts[0]).all())
            kept = self._kept(queries, torch.zeros_like(lengths), lengths)
            if len(kept):
                self._add(queries, self._keys(chosen), prompts[:1] if same else prompts, kept)

    def _append(self, rows: Tensor, begins: Tensor, ends: Tensor) -> Tensor:
        """Append the tokens from ``begins`` to ``ends`` ``[b]`` of each row; where the first of each lands."""
        steps = torch.arange(int(ends.max()) if len(ends) else 0)  # [l]
        inside = (steps >= begins[:, None]) & (steps < ends[:, None])  # [b, l]
        columns = (self.sequences.starts[rows][:, None] + steps).clamp(max=self.sequences.input_ids.shape[1] - 1)
        self.tokens.append(self.sequences.input_ids[rows[:, None], columns][inside])
        self.positions.append(steps.expand(inside.shape)[inside])
        counts = ends - begins
        places = self.count + counts.cumsum(0) - counts
        self.count += int(counts.sum())
        return places

    def _keys(self, rows: Tensor) -> Tensor:
        """``[b, l]`` the places of whole sequences."""
        steps = torch.arange(int(self.sequences.lengths[rows].max()))
        prompts = self.sequences.prompt_lengths[rows][:, None]
        after = self.response_places[rows][:, None] + steps - prompts
        places = torch.where(steps < prompts, self.prompt_places[rows][:, None] + steps, after)
        return places.where(steps < self.sequences.lengths[rows][:, None], 0)

    def _kept(self, queries: Tensor, begins: Tensor, ends: Tensor) -> Tensor:
        steps = torch.arange(queries.shape[1])
        return ((steps >= begins[:, None]) & (steps < ends[:, None])).flatten().nonzero().squeeze(-1)

    def _add(self, queries: Tensor, keys: Tensor, before: Tensor | None, kept: Tensor) -> None:
        moved = None if before is None else before.to(self.device)
        self.parts.append(Part(queries.to(self.device), keys.to(self.device), moved, kept.to(self.device)))


def _similar(order: Sequence[int], lengths: Sequence[int]) -> Iterator[list[int]]:
    """Cut rows, given in the order of rising length, so that padding stays below :data:`WASTE`."""
    rows: list[int] = []
    tokens = 0
    for row in order:
        if rows and lengths[row] * (len(rows) + 1) > WASTE * (tokens + lengths[row]):
            yield rows
            rows, tokens = [], 0
        rows.append(row)
        tokens += lengths[row]
    if rows:
        yield rows
