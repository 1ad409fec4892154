"""The embedded engine's key-value cache: transformers' own, whose attention layers have room to grow in."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer, LinearAttentionLayer

from ibro_lightning.errors import ConfigError

CACHE_KEYS = ("layer_types", "sliding_window", "attention_chunk_size", "num_kv_shared_layers", "number_of_conv_states")
"""Config keys from which transformers builds a cache, for any architecture."""
BLOCK = 16
"""Tokens by which a buffer grows. Growing copies what it holds, so each token is copied once per ``BLOCK`` others."""


def cache_config(config: Any) -> Any:
    """A copy of a model's config from which ``DynamicCache`` builds the right cache.

    Removes keys that the architecture does not use, such as a ``sliding_window`` in a Llama config: the model ignores
    them, but transformers would build a cache that drops tokens.
    """
    config = deepcopy(config.get_text_config(decoder=True))
    try:
        own = type(config)()
    except Exception:  # a custom class without defaults; engines.probe still checks the result
        return config
    for key in CACHE_KEYS:
        if key in vars(config) and not hasattr(own, key):
            delattr(config, key)
    return config


def select_rows(cache: DynamicCache, rows: Tensor) -> None:
    """Select ``rows`` of the batch, in this order; rows may be repeated.

    Only ``reorder_cache`` supports every kind of layer: ``batch_select_indices`` is missing for linear attention and
    state spaces, and hybrid layers select only their keys and values with it.
    """
    cache.reorder_cache(rows)


class Buffer:
    """``[B, H, L, D]`` keys or values inside a larger tensor: appending a token or dropping a row copies nothing else.

    Args:
        states: the first ones, used as they are.
    """

    def __init__(self, states: Tensor) -> None:
        self._data, self._rows, self._start, self._end = states, states.shape[0], 0, states.shape[2]

    @property
    def states(self) -> Tensor:
        """``[B, H, L, D]``, a view."""
        return self._data[: self._rows, :, self._start : self._end]

    def append(self, states: Tensor) -> None:
        """Add ``[B, H, new, D]`` on the right."""
        new = states.shape[2]
        if self._end + new > self._data.shape[2]:
            self._replace([self.states], self._end - self._start + new)
        self._end += new
        self._data[: self._rows, :, self._end - new : self._end] = states

    def keep_last(self, length: int) -> None:
        """Drop all but the last ``length`` tokens."""
        self._start = max(self._start, self._end - length)

    def repeat(self, rows: Tensor) -> None:
        """Select rows of the batch, in this order; rows may be repeated."""
        self._replace([self.states.index_select(0, rows)], self._end - self._start)

    def drop(self, count: int, moved: Tensor, sources: Tensor) -> None:
        """Keep the first ``count`` rows, after those of ``sources`` have moved to the places ``moved``."""
        self.states[moved] = self.states[sources]
        self._rows = count

    def join(self, other: Buffer) -> None:
        """Add the rows of ``other`` below, with their last tokens side by side; the shorter side gets zeros on its
        left, as undefined values would spread through weights of 0."""
        parts = [self.states, other.states]
        self._replace(parts, max(part.shape[2] for part in parts))

    def _replace(self, parts: list[Tensor], tokens: int) -> None:
        """Move to a new tensor that holds ``parts`` one below the other, and has room for ``tokens`` and a block."""
        length, rows = max(part.shape[2] for part in parts), sum(len(part) for part in parts)
        _, heads, _, size = parts[0].shape
        data, first = parts[0].new_empty(rows, heads, tokens + BLOCK, size), 0
        for part in parts:
            pad, last = length - part.shape[2], first + len(part)
            data[first:last, :, :pad] = 0
            data[first:last, :, pad:length] = part
            first = last
        self._data, self._rows, self._start, self._end = data, rows, 0, length


class GrowingLayer(DynamicLayer):
    """Full attention: all keys and values."""

    buffers: tuple[Buffer, Buffer]

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Add keys and values, and return all of them; ``[B, H, L, D]``."""
        if self.is_initialized:
            self.buffers[0].append(key_states)
            self.buffers[1].append(value_states)
        else:
            self.lazy_initialization(key_states, value_states)
            self.buffers = (Buffer(key_states), Buffer(value_states))
        return self._expose()

    def keep_last(self, length: int) -> None:
        """Drop all but the last ``length`` tokens."""
        self._change(lambda buffer, _: buffer.keep_last(length))

    def repeat(self, rows: Tensor) -> None:
        """See :meth:`Buffer.repeat`."""
        self._change(lambda buffer, _: buffer.repeat(rows))

    def drop(self, count: int, moved: Tensor, sources: Tensor) -> None:
        """See :meth:`Buffer.drop`."""
        self._change(lambda buffer, _: buffer.drop(count, moved, sources))

    def join(self, other: GrowingLayer) -> None:
        """See :meth:`Buffer.join`."""
        self._change(lambda buffer, index: buffer.join(other.buffers[index]))

    def _change(self, change: Callable[[Buffer, int], None]) -> None:
        for index, buffer in enumerate(self.buffers):
            change(buffer, index)
        self._expose()

    def _expose(self) -> tuple[Tensor, Tensor]:
        self.keys, self.values = (buffer.states for buffer in self.buffers)
        return self.keys, self.values


class GrowingWindowLayer(DynamicSlidingWindowLayer, GrowingLayer):
    """Sliding windows: the keys and values that the next token can see."""

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Add keys and values; returns those that the new tokens can see."""
        self.cumulative_length += key_states.shape[-2]
        seen = GrowingLayer.update(self, key_states, value_states)
        self.keep_last(self.sliding_window - 1)
        return seen


class GrowingCache(DynamicCache):
    """A cache that copies only rows that change their place when others are dropped."""

    def reorder_cache(self, beam_idx: Tensor) -> None:
        growing = [layer for layer in self.layers if isinstance(layer, GrowingLayer)]
        if growing and len(beam_idx) > len(growing[0].keys):
            for layer in growing:
                layer.repeat(beam_idx)
        elif growing:
            # Once for all layers: finding them waits for the accelerator.
            moved = (beam_idx != torch.arange(len(beam_idx), device=beam_idx.device)).nonzero().squeeze(-1)
            sources = beam_idx[moved]
            for layer in growing:
                layer.drop(len(beam_idx), moved, sources)
        for layer in self.layers:
            if not isinstance(layer, GrowingLayer):
                layer.reorder_cache(beam_idx)


def growing_cache(config: Any) -> GrowingCache:
    """A cache to whose rows those of another can be added with :func:`join_rows`.

    Args:
        config: see :func:`cache_config`.

    Raises:
        ConfigError: it needs other layers than full attention, sliding windows of one size and linear attention.
    """
    cache = GrowingCache(config=config)
    # Transformers keeps chunks as it keeps windows, but their masks are others.
    chunks = getattr(config, "attention_chunk_size", None) or "chunked_attention" in (
        getattr(config, "layer_types", None) or ()
    )
    windows = set()
    for index, layer in enumerate(cache.layers):
        if type(layer) is DynamicLayer:
            cache.layers[index] = GrowingLayer()
        elif type(layer) is DynamicSlidingWindowLayer and not chunks:
            cache.layers[index] = GrowingWindowLayer(layer.sliding_window)
            windows.add(layer.sliding_window)
        elif type(layer) is not LinearAttentionLayer:
            raise ConfigError("engine", "HFEngine", f"{type(layer).__name__} cannot grow: use Batch")
    if len(windows) > 1:
        raise ConfigError("engine", "HFEngine", f"windows of {sorted(windows)} tokens need several masks: use Batch")
    return cache


def join_rows(cache: DynamicCache, other: DynamicCache) -> None:
    """Add the rows of ``other`` to a growing cache, with their last tokens side by side."""
    for layer, more in zip(cache.layers, other.layers, strict=True):
        if isinstance(layer, GrowingLayer):
            layer.join(more)
        else:
            for states, added in (
                (layer.conv_states, more.conv_states),
                (layer.recurrent_states, more.recurrent_states),
            ):
                for index, state in states.items():
                    if state is not None:  # some have only one of the two
                        states[index] = torch.cat([state, added[index]])
