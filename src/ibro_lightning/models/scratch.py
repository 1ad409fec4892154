"""Models with random initial weights."""

from __future__ import annotations

import copy
from typing import Any, Protocol

import torch
from transformers import AutoModelForCausalLM, Qwen2Config

from ibro_lightning.models.loading import PolicyOptions, PolicySource


class Task(Protocol):
    """What a model from scratch needs of a task."""

    def tokenizer(self) -> Any:
        """A transformers tokenizer with EOS and padding tokens; its length is the model's vocabulary."""


class Qwen2FromScratch(PolicySource):
    """A small Qwen2 with random weights, tied embeddings and a task's own tokenizer: where the quick start begins.

    Args:
        task: whose tokenizer and vocabulary to use.
        hidden_size: of a token's state.
        num_layers: decoder blocks.
        num_heads: of the queries.
        num_kv_heads: of keys and values.
        intermediate_size: of the feed-forward layers.
        max_position_embeddings: longest prompt + response in tokens.
        initializer_range: standard deviation of the initial weights. Small models need 0.08 rather than Qwen's 0.02.
        seed: of the random weights.
    """

    def __init__(
        self,
        task: Task,
        hidden_size: int = 96,
        num_layers: int = 3,
        num_heads: int = 4,
        num_kv_heads: int = 2,
        intermediate_size: int = 256,
        max_position_embeddings: int = 256,
        initializer_range: float = 0.08,
        seed: int = 0,
    ) -> None:
        self._tokenizer = task.tokenizer()
        self._config = Qwen2Config(
            vocab_size=len(self._tokenizer),
            hidden_size=hidden_size,
            num_hidden_layers=num_layers,
            num_attention_heads=num_heads,
            num_key_value_heads=num_kv_heads,
            intermediate_size=intermediate_size,
            max_position_embeddings=max_position_embeddings,
            initializer_range=initializer_range,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=self._tokenizer.eos_token_id,
            pad_token_id=self._tokenizer.pad_token_id,
        )
        self._seed = seed

    def __str__(self) -> str:
        return type(self).__name__

    def tokenizer(self) -> Any:
        return self._tokenizer

    def config(self) -> Any:
        return self._config

    def build(self, options: PolicyOptions) -> Any:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self._seed)
            config = copy.deepcopy(self._config)  # from_config modifies it
            model = AutoModelForCausalLM.from_config(config, attn_implementation=options.attn_implementation)
            return model.to(getattr(torch, options.dtype))
