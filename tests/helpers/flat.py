"""Tokens without padding, ``[N]``, and padded, ``[B, T]``: each made from the other row by row."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence


def flat(values: Tensor, lengths: Tensor | Sequence[int]) -> Tensor:
    """``[B, T]`` → ``[N]``."""
    return torch.cat([row[:length] for row, length in zip(values, torch.as_tensor(lengths).tolist(), strict=True)])


def wide(values: Tensor, lengths: Tensor | Sequence[int]) -> Tensor:
    """``[N]`` → ``[B, T]``, 0 on padding."""
    return pad_sequence(values.split(torch.as_tensor(lengths).tolist()), batch_first=True)


def span(lengths: Tensor, row: int) -> slice:
    """Where a row's tokens are in ``[N]``."""
    return slice(int(lengths[:row].sum()), int(lengths[: row + 1].sum()))
