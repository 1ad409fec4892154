"""The batch of the embedded engine: a network, and what it has computed of the rows that are being generated."""

from __future__ import annotations

import inspect
from typing import Any, Self

import torch
from torch import Tensor
from transformers import DynamicCache

from ibro_lightning.engines.hf_attention import GROUPED
from ibro_lightning.engines.hf_cache import (
    GrowingLayer,
    GrowingWindowLayer,
    cache_config,
    growing_cache,
    join_rows,
    select_rows,
)
from ibro_lightning.errors import ConfigError


class Network:
    """A causal language model that continues rows from a cache.

    Args:
        model: of transformers.
    """

    def __init__(self, model: Any) -> None:
        self.model, self.cache_config = model, cache_config(model.config)
        accepted = inspect.signature(model.forward).parameters
        self.takes_positions = "position_ids" in accepted
        self._last_only = {"logits_to_keep": 1} if "logits_to_keep" in accepted else {}
        positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        self.max_length: int | None = positions if positions and positions > 0 else None  # XLNet's -1: any number

    def logits(self, input_ids: Tensor, attention_mask: Any, positions: Tensor, cache: DynamicCache) -> Tensor:
        """``[B, V]`` logits of the next token; ``input_ids [B, new]`` are the tokens not yet in the cache."""
        kwargs: dict[str, Any] = {"position_ids": positions} if self.takes_positions else {}
        kwargs |= {"input_ids": input_ids, "attention_mask": attention_mask, "past_key_values": cache}
        logits: Tensor = self.model(**kwargs, **self._last_only, use_cache=True).logits
        return logits[:, -1]


class Batch:
    """Rows of any model that transformers can generate with: it builds masks from the padding, and copies the cache
    when it grows.

    Args:
        attention_mask: ``[B, L]``, 1 where a row has a token.
        cache: what the network has computed of these tokens.
    """

    joinable = False
    """Whether other rows can :meth:`join` while these are generated."""
    attention = "sdpa"
    """Transformers' name of the attention of models that can use ``sdpa``."""

    def __init__(self, network: Network, attention_mask: Tensor, cache: DynamicCache) -> None:
        self.network, self.attention_mask, self.cache = network, attention_mask, cache

    @classmethod
    def adopt(cls, network: Network) -> None:
        """Prepare the network for such batches; raises ConfigError if it cannot have them."""
        model = network.model
        if model.config._attn_implementation in ("sdpa", GROUPED) and model._can_set_attn_implementation():
            model.set_attn_implementation(cls.attention)

    @classmethod
    def start(cls, network: Network, input_ids: Tensor, attention_mask: Tensor) -> tuple[Self, Tensor]:
        """Prompts ``[P, L]``, padded on the left, and the logits ``[P, V]`` of their next token."""
        positions = (attention_mask.cumsum(dim=1) - 1).clamp(min=0)
        cache = cls._new_cache(network)
        logits = network.logits(input_ids, attention_mask, positions, cache)
        return cls(network, attention_mask, cache), logits

    @staticmethod
    def _new_cache(network: Network) -> DynamicCache:
        return DynamicCache(config=network.cache_config)

    def extend(self, tokens: Tensor) -> Tensor:
        """``[B, V]`` logits of the token after ``tokens [B]``."""
        self.attention_mask = torch.cat([self.attention_mask, self.attention_mask.new_ones(len(tokens), 1)], dim=1)
        positions = self.attention_mask.sum(dim=1, keepdim=True) - 1
        return self.network.logits(tokens[:, None], self.attention_mask, positions, self.cache)

    def select(self, rows: Tensor) -> None:
        """Select rows, in this order; rows may be repeated."""
        select_rows(self.cache, rows)
        self.attention_mask = self.attention_mask[rows]

    def join(self, other: Self) -> None:
        """Add the rows of ``other`` below."""
        raise NotImplementedError(f"no rows can join a {type(self).__name__}")


class GrowingBatch(Batch):
    """Rows whose cache grows in place, whose masks need no building, and that others can join.

    All rows end in the last column, so one that joins has padding on its left; what a token computes depends on its
    position in its row, not on its column. Columns in which no row has a token any more are dropped: the batch is as
    wide as its longest row.
    """

    joinable = True
    attention = GROUPED

    def __init__(self, network: Network, attention_mask: Tensor, cache: DynamicCache) -> None:
        super().__init__(network, attention_mask, cache)
        self._length = attention_mask.shape[1]
        self._starts = self._length - attention_mask.sum(dim=1)  # [B] column of each row's first token
        self._windows = {layer.sliding_window for layer in cache.layers if isinstance(layer, GrowingWindowLayer)}
        self._all_slide = not any(type(layer) is GrowingLayer for layer in cache.layers)

    @classmethod
    def adopt(cls, network: Network) -> None:
        cls._new_cache(network)
        if not network.takes_positions or network.model.config._attn_implementation not in OWN_MASKS:
            raise ConfigError("engine", "HFEngine", "the model builds positions or masks of its own: use Batch")
        super().adopt(network)

    @staticmethod
    def _new_cache(network: Network) -> DynamicCache:
        return growing_cache(network.cache_config)

    def extend(self, tokens: Tensor) -> Tensor:
        # A row that has ended, and goes on until it is dropped, may exceed the model's positions.
        positions = (self._length - self._starts).clamp(max=(self.network.max_length or self._length + 1) - 1)[:, None]
        self._length += 1
        return self.network.logits(tokens[:, None], self._masks(), positions, self.cache)

    def select(self, rows: Tensor) -> None:
        select_rows(self.cache, rows)
        self._starts = self._starts[rows]
        self._drop_columns()

    def join(self, other: Self) -> None:
        join_rows(self.cache, other.cache)
        length = max(self._length, other._length)
        self._starts = torch.cat([batch._starts + length - batch._length for batch in (self, other)])
        self._length = length

    def _drop_columns(self) -> None:
        """Drop the columns in which no row has a token."""
        if empty := int(self._starts.min()):
            self._length -= empty
            self._starts = self._starts - empty
            for layer in self.cache.layers:
                if isinstance(layer, GrowingLayer):
                    layer.keep_last(self._length)

    def _masks(self) -> Tensor | dict[str, Tensor | None]:
        """``[B, 1, 1, L]`` to be added to the scores of one new token per row; by type of layer if these differ."""
        columns = torch.arange(self._length, device=self._starts.device)
        mask = torch.zeros(len(self._starts), self._length, dtype=self.network.model.dtype, device=columns.device)
        mask = mask.masked_fill_(columns < self._starts[:, None], -torch.inf)[:, None, None]
        if not self._windows:
            return mask
        window = mask[..., -min(self._windows) :]
        if self._all_slide:
            return window
        masks = {"full_attention": mask, "sliding_attention": window}
        return {kind: masks.get(kind) for kind in self.network.cache_config.layer_types}


OWN_MASKS = ("sdpa", "eager", GROUPED)
"""Implementations of attention that add any mask which they are given to the scores."""
