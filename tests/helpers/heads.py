"""Models with every kind of linear head."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    GPTJConfig,
    GPTJForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PhiConfig,
    PhiForCausalLM,
)

from helpers.models import gpt2, qwen2

SIZES: dict[str, Any] = {
    "vocab_size": 23,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "intermediate_size": 24,
    "max_position_embeddings": 64,
    "initializer_range": 0.4,
    "bos_token_id": None,
    "eos_token_id": 0,
    "pad_token_id": 0,
}


def tiny(config: type, model: type, **settings: Any) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return model(config(**{**SIZES, **settings}))


def with_bias(model: Any) -> Any:
    """Biases start at 0, where nobody would miss them."""
    with torch.no_grad():
        model.lm_head.bias.copy_(torch.linspace(-2, 2, len(model.lm_head.bias)))
    return model


def gptj() -> Any:
    config = GPTJConfig(
        vocab_size=23, n_positions=64, n_embd=16, n_layer=2, n_head=2, rotary_dim=4, initializer_range=0.4
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return with_bias(GPTJForCausalLM(config))


LINEAR: dict[str, Callable[[], Any]] = {
    "qwen2, tied": qwen2,
    "qwen2, untied": lambda: qwen2(tie_word_embeddings=False),
    "gpt2, tied": gpt2,
    "gpt2, untied": lambda: gpt2(tie_word_embeddings=False),
    "llama, tied": lambda: tiny(LlamaConfig, LlamaForCausalLM, tie_word_embeddings=True),
    "llama, untied": lambda: tiny(LlamaConfig, LlamaForCausalLM, tie_word_embeddings=False),
    "gptj, bias": gptj,
    "phi, bias": lambda: with_bias(tiny(PhiConfig, PhiForCausalLM, num_key_value_heads=2)),
    "cohere, scaled up": lambda: tiny(CohereConfig, CohereForCausalLM, logit_scale=1.5),
    "cohere, as published": lambda: tiny(CohereConfig, CohereForCausalLM, logit_scale=0.0625),
    "granite, divided by 6": lambda: tiny(GraniteConfig, GraniteForCausalLM, logits_scaling=6.0),
    "granite, multiplied by 3": lambda: tiny(GraniteConfig, GraniteForCausalLM, logits_scaling=1 / 3),
}
