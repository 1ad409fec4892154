"""Prompts and responses, without padding or as one padded batch, and the move of whole batches between devices."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from itertools import pairwise
from typing import Any, Literal, Self, TypeVar

import numpy as np
import torch
from torch import Tensor

from ibro_lightning.batches.ragged import tokens_of

T = TypeVar("T")


def repr_of_shapes(instance: Any) -> str:
    """A ``repr`` for a dataclass of tensors: shapes instead of values, counts instead of rows, nothing for None."""
    values = {field.name: getattr(instance, field.name) for field in fields(instance)}
    shown = ", ".join(f"{name}={_briefly(value)}" for name, value in values.items() if value is not None)
    return f"{type(instance).__name__}({shown})"


def _briefly(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{list(value.shape)} {str(value.dtype).removeprefix('torch.')}"
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{key}: {_briefly(item)}' for key, item in value.items())}}}"
    if isinstance(value, tuple):
        return f"{len(value)} × {type(value[0]).__name__}" if value else "()"
    return repr(value) if isinstance(value, str | int | float) or is_dataclass(value) else type(value).__name__


@dataclass(frozen=True, repr=False)
class FlatSequences:
    """Prompts and responses of a rollout, row after row without padding.

    ``prompts [P]``, ``responses [N]`` int32 token ids; ``prompt_lengths``, ``response_lengths`` ``[B]``.
    """

    prompts: Tensor
    responses: Tensor
    prompt_lengths: Tensor
    response_lengths: Tensor

    __repr__ = repr_of_shapes

    @classmethod
    def collate(cls, prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]]) -> Self:
        """Put token ids one after the other."""
        if len(prompts) != len(responses):
            raise ValueError(f"{len(prompts)} prompts and {len(responses)} responses: give one for each")
        lengths = (torch.tensor([len(ids) for ids in rows], dtype=torch.long) for rows in (prompts, responses))
        return cls(joined(prompts, np.int32), joined(responses, np.int32), *lengths)

    def __len__(self) -> int:
        return len(self.prompt_lengths)

    @property
    def lengths(self) -> Tensor:
        """``[B]`` prompt + response tokens."""
        return self.prompt_lengths + self.response_lengths

    @property
    def device(self) -> torch.device:
        return self.responses.device

    def same_prompts(self) -> list[int]:
        """``[B]`` for each row, the first row with the same prompt, token by token."""
        ends = self.prompt_lengths.cumsum(0).tolist()
        tokens, firsts = self.prompts.cpu().numpy(), dict[bytes, int]()
        spans = enumerate(pairwise([0, *ends]))
        return [firsts.setdefault(tokens[start:end].tobytes(), row) for row, (start, end) in spans]

    def select(self, rows: Tensor) -> Self:
        """These rows."""
        if rows.tolist() == list(range(len(self))):
            return self
        return type(self)(
            self.prompts.index_select(0, tokens_of(self.prompt_lengths, rows)),
            self.responses.index_select(0, tokens_of(self.response_lengths, rows)),
            self.prompt_lengths[rows],
            self.response_lengths[rows],
        )

    def pad(self, rows: Tensor | None = None) -> Sequences:
        """These rows, or all, as a batch that is padded right."""
        rows = torch.arange(len(self), device=self.device) if rows is None else rows
        prompts, responses = self.prompt_lengths[rows], self.response_lengths[rows]  # [b]
        width = int((prompts + responses).max()) if len(rows) else 0
        input_ids = torch.zeros(len(rows), width, dtype=torch.long, device=self.device)  # [b, L]
        empty = Sequences(input_ids, torch.zeros_like(prompts), prompts, responses)
        tokens = self.select(rows)
        filled = input_ids.masked_scatter(empty.is_prompt, tokens.prompts.long())
        return replace(empty, input_ids=filled.masked_scatter_(empty.is_response, tokens.responses.long()))

    def to(self, device: torch.device | str) -> Self:
        return to_device(self, device)


def joined(rows: Iterable[Any], dtype: type[np.generic]) -> Tensor:
    """``[N]``: sequences of numbers one after the other."""
    return torch.from_numpy(np.concatenate([np.empty(0, dtype), *(np.asarray(row, dtype) for row in rows)]))


@dataclass(frozen=True, repr=False)
class Sequences:
    """Prompts and responses as one padded batch, such as a micro-batch, with the position of each response.

    ``input_ids [B, L]``; ``starts``, ``prompt_lengths``, ``response_lengths`` ``[B]``: row ``i`` holds its prompt from
    ``starts[i]`` on, its response right after, and padding elsewhere. Padding is identified by position, never by token
    id, so that a pad token may equal EOS.
    """

    input_ids: Tensor
    starts: Tensor
    prompt_lengths: Tensor
    response_lengths: Tensor

    __repr__ = repr_of_shapes

    @classmethod
    def collate(
        cls,
        prompts: Sequence[Sequence[int]],
        responses: Sequence[Sequence[int]],
        *,
        padding_side: Literal["left", "right"] = "right",
    ) -> Self:
        """Pad token lists to a batch. The trainer pads right; no result depends on the side."""
        prompt_lengths = torch.tensor([len(ids) for ids in prompts], dtype=torch.long)
        response_lengths = torch.tensor([len(ids) for ids in responses], dtype=torch.long)
        totals = prompt_lengths + response_lengths
        width = int(totals.max()) if len(prompts) else 0
        starts = width - totals if padding_side == "left" else torch.zeros_like(totals)
        input_ids = torch.zeros(len(prompts), width, dtype=torch.long)
        for row, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
            start, total = int(starts[row]), int(totals[row])
            input_ids[row, start : start + total] = torch.tensor([*prompt, *response], dtype=torch.long)
        return cls(input_ids, starts, prompt_lengths, response_lengths)

    def __len__(self) -> int:
        return self.input_ids.shape[0]

    @property
    def lengths(self) -> Tensor:
        """``[B]`` prompt + response tokens."""
        return self.prompt_lengths + self.response_lengths

    @property
    def device(self) -> torch.device:
        return self.input_ids.device

    @property
    def attention_mask(self) -> Tensor:
        """``[B, L]`` int64, 1 on prompt and response."""
        position = self._position
        return ((position >= 0) & (position < self.lengths[:, None])).long()

    @property
    def position_ids(self) -> Tensor:
        """``[B, L]`` int64 from 0 at the prompt's first token; 0 on padding before it."""
        return self._position.clamp(min=0)

    @property
    def is_prompt(self) -> Tensor:
        """``[B, L]`` bool: which input tokens are prompt tokens."""
        position = self._position
        return (position >= 0) & (position < self.prompt_lengths[:, None])

    @property
    def is_response(self) -> Tensor:
        """``[B, L]`` bool: which input tokens are response tokens."""
        position = self._position
        return (position >= self.prompt_lengths[:, None]) & (position < self.lengths[:, None])

    @property
    def response_mask(self) -> Tensor:
        """``[B, T]`` bool, response-aligned: token ``t`` of row ``i`` exists."""
        steps = torch.arange(self.max_response_length, device=self.input_ids.device)
        return steps[None, :] < self.response_lengths[:, None]

    @property
    def max_response_length(self) -> int:
        return int(self.response_lengths.max()) if len(self) else 0

    def same_prompts(self) -> list[int]:
        """``[B]`` for each row, the first row with the same prompt, token by token."""
        tokens, spans = self.input_ids.tolist(), zip(self.starts.tolist(), self.prompt_lengths.tolist(), strict=True)
        firsts: dict[tuple[int, ...], int] = {}
        return [
            firsts.setdefault(tuple(tokens[row][start : start + length]), row)
            for row, (start, length) in enumerate(spans)
        ]

    def flatten(self) -> FlatSequences:
        """The same rows without padding."""
        tokens = self.input_ids[self.is_prompt].int(), self.input_ids[self.is_response].int()
        return FlatSequences(*tokens, self.prompt_lengths, self.response_lengths)

    def without_last(self) -> Self:
        """The same rows without the last response token, from which no other is predicted."""
        return replace(self, response_lengths=(self.response_lengths - 1).clamp(min=0))

    def select(self, rows: Tensor) -> Self:
        """These rows, without the padding that none of them needs."""
        starts, lengths = self.starts[rows], self.lengths[rows]
        first, end = int(starts.min()), int((starts + lengths).max())
        return type(self)(
            self.input_ids[rows, first:end], starts - first, self.prompt_lengths[rows], self.response_lengths[rows]
        )

    def to(self, device: torch.device | str) -> Self:
        return to_device(self, device)

    @property
    def _position(self) -> Tensor:
        """``[B, L]`` index within the row's own sequence; negative before its start."""
        columns = torch.arange(self.input_ids.shape[1], device=self.input_ids.device)
        return columns[None, :] - self.starts[:, None]


def to_device(instance: T, device: torch.device | str) -> T:
    """A copy of a frozen dataclass with all its tensors moved, nested ones included."""
    moved = {f.name: _move(getattr(instance, f.name), device) for f in fields(instance)}  # type: ignore[arg-type]
    return replace(instance, **moved)  # type: ignore[type-var]


def _move(value: Any, device: torch.device | str) -> Any:
    if isinstance(value, Tensor | FlatSequences | Sequences):
        return value.to(device)
    if isinstance(value, Mapping):
        return {key: _move(item, device) for key, item in value.items()}
    return value
