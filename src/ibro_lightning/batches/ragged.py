"""Values of tokens without padding: ``[N]``, row after row. Some rows at a time are padded, to ``[b, t]``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

AT_ONCE = 1 << 16
"""Tokens, with padding, of rows that are padded together where all rows are gone through. A longer row is alone."""


@dataclass(frozen=True)
class Places:
    """Where the tokens of some rows are in ``[N]``."""

    index: Tensor
    """``[b, t]``; 0 on padding."""
    exists: Tensor
    """``[b, t]`` bool: False on padding."""

    @classmethod
    def of(cls, lengths: Tensor, rows: Tensor) -> Self:
        """The places of ``rows``, among rows of ``lengths [B]``."""
        starts, own = (lengths.cumsum(0) - lengths)[rows], lengths[rows]  # [b]
        steps = torch.arange(int(own.max()) if len(own) else 0, device=lengths.device)  # [t]
        exists = steps < own[:, None]
        return cls((starts[:, None] + steps).masked_fill(~exists, 0), exists)

    def pad(self, values: Tensor) -> Tensor:
        """``[N]`` → ``[b, t]``, 0 on padding."""
        return values[self.index].masked_fill(~self.exists, 0)

    def put(self, padded: Tensor, values: Tensor) -> None:
        """Write ``[b, t]`` into ``values [N]``."""
        values[self.index[self.exists]] = padded[self.exists].to(values.dtype)


def tokens_of(lengths: Tensor, rows: Tensor) -> Tensor:
    """``[n]`` int32: the places in ``[N]`` of the tokens of some rows, row after row; for ``index_select``."""
    starts, own = (lengths.cumsum(0) - lengths)[rows], lengths[rows]  # [b]
    shift = per_token((starts - own.cumsum(0) + own).int(), own)  # [n]
    return torch.arange(len(shift), dtype=torch.int32, device=lengths.device) + shift


def put_tokens(own: Tensor, values: Tensor, lengths: Tensor, rows: Tensor) -> None:
    """Write ``own [n]``, the tokens of some rows, into ``values [N]``."""
    values[tokens_of(lengths, rows)] = own


def per_token(values: Tensor, lengths: Tensor) -> Tensor:
    """``[B]`` → ``[N]``: each row's value, on each of its tokens."""
    return values.index_select(0, torch.repeat_interleave(lengths.int()))


def row_sums(values: Tensor, lengths: Tensor) -> Tensor:
    """``[N]`` → ``[B]``."""
    sums = torch.zeros_like(lengths, dtype=values.dtype if values.is_floating_point() else torch.long)
    for rows, places in similar_rows(lengths):
        sums[rows] = places.pad(values).sum(dim=1)
    return sums


def row_wise(
    function: Callable[..., Tensor | tuple[Tensor, ...]], lengths: Tensor, *values: Tensor
) -> tuple[Tensor, ...]:
    """Apply a function of padded tensors to flat ones.

    Args:
        function: ``(rows, mask, *values)`` → one tensor or several, ``[b, t]``; ``rows [b]`` are their numbers. What it
            computes of a row must depend on neither the others nor the padding.
        values: ``[N]`` each.

    Returns:
        What the function does, ``[N]`` each.
    """
    results: tuple[Tensor, ...] = ()
    for rows, places in similar_rows(lengths):
        parts = function(rows, places.exists, *map(places.pad, values))
        parts = parts if isinstance(parts, tuple) else (parts,)
        results = results or tuple(part.new_empty(int(lengths.sum())) for part in parts)
        for part, result in zip(parts, results, strict=True):
            places.put(part, result)
    return results


def similar_rows(lengths: Tensor, at_once: int = AT_ONCE) -> Iterator[tuple[Tensor, Places]]:
    """All rows, those of similar length together; a rollout without rows is one part without rows."""
    if len(lengths) * max(lengths.tolist(), default=0) <= at_once:
        rows = torch.arange(len(lengths), device=lengths.device)
        yield rows, Places.of(lengths, rows)
        return
    part: list[int] = []
    for row, length in sorted(enumerate(lengths.tolist()), key=lambda pair: pair[1]):
        if part and length * (len(part) + 1) > at_once:
            yield _placed(lengths, part)
            part = []
        part.append(row)
    yield _placed(lengths, part)


def _placed(lengths: Tensor, part: list[int]) -> tuple[Tensor, Places]:
    rows = torch.tensor(part, dtype=torch.long, device=lengths.device)
    return rows, Places.of(lengths, rows)
