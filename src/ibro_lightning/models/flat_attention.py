"""Attention over a :class:`.FlatBatch`, in a transformers model that knows nothing of it.

A model looks its attention function up by the name in its config. Within :func:`flat_attention` that name is ours: the
function lays the row's queries, keys and values out as padded sequences, calls the model's own attention function, and
puts the results back into the row. transformers builds no masks for a name that it does not know, which would be N × N.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ibro_lightning.batches.flat import FlatBatch

NAME = "ibro_flat"
SUPPORTED = ("sdpa", "eager")
"""Attention functions that take any mask. Those of flash attention need none, but lengths in their own form."""


@dataclass(frozen=True)
class _Flat:
    """What the layers of a model attend with: a batch, and the attention function's name in the model's config."""

    batch: FlatBatch
    config: Any
    implementation: str


_present: ContextVar[_Flat | None] = ContextVar("flat attention", default=None)


@contextmanager
def flat_attention(config: Any, batch: FlatBatch) -> Iterator[None]:
    """Within, models of this text config attend over ``batch``, their only row."""
    with _attending(_Flat(batch, config, config._attn_implementation)):
        yield


def recomputing() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """Contexts of a checkpointed block's forward pass and of its recomputation, which comes when the batch's own
    context has ended: ``context_fn`` of ``torch.utils.checkpoint``."""
    flat = _present.get()
    return nullcontext(), nullcontext() if flat is None else _attending(flat)


@contextmanager
def _attending(flat: _Flat) -> Iterator[None]:
    before, token = flat.config._attn_implementation, _present.set(flat)
    flat.config._attn_implementation = NAME
    try:
        yield
    finally:
        flat.config._attn_implementation = before
        _present.reset(token)


def _attend(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """transformers' interface: ``[1, heads, N, D]`` each → ``[1, N, heads, D]``."""
    flat = _present.get()
    assert flat is not None, f"{NAME} is only used within flat_attention"
    code = sys.modules[type(module).__module__]
    functions = getattr(code, "ALL_ATTENTION_FUNCTIONS", ALL_ATTENTION_FUNCTIONS)  # a model may replace some
    attend = functions.get_interface(flat.implementation, getattr(code, "eager_attention_forward", None))
    window = options.get("sliding_window")
    flat.batch.windows.add(window)
    query, key, value = (states[0].transpose(0, 1) for states in (query, key, value))  # [N, heads, D]
    results = []
    for part in flat.batch.parts:
        mask = None
        if flat.implementation == "eager":
            mask = _additive(part.mask(window), query.dtype)
        elif not part.is_causal(window):
            mask = part.mask(window)
        states = (_rows(query, part.queries), _rows(key, part.keys), _rows(value, part.keys))
        attended, _ = attend(module, *states, mask, **options)  # [b, t, heads, D]
        results.append(attended.flatten(0, 1).index_select(0, part.kept))
    return torch.cat(results)[None], None


def _rows(states: Tensor, places: Tensor) -> Tensor:
    """``[N, heads, D]`` → ``[b, heads, t, D]``."""
    return states.index_select(0, places.flatten()).unflatten(0, places.shape).transpose(1, 2)


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """0 where a key is seen, the most negative number elsewhere, which is what eager attention adds to its scores."""
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, torch.finfo(dtype).min)


ALL_ATTENTION_FUNCTIONS.register(NAME, _attend)
