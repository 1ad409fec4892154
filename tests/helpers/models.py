"""Policies and critics of a few thousand weights, of several architectures."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import torch
from transformers import (
    GPT2Config,
    GPT2ForTokenClassification,
    GPT2LMHeadModel,
    OPTConfig,
    OPTForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from ibro_lightning.models import PolicyOptions, PolicySource

VOCAB = 23


def qwen2(seed: int = 0, **overrides: Any) -> Qwen2ForCausalLM:
    """Weights large enough that distributions are far from uniform."""
    config = Qwen2Config(
        **{
            "vocab_size": VOCAB,
            "hidden_size": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "intermediate_size": 24,
            "max_position_embeddings": 64,
            "initializer_range": 0.4,
            "tie_word_embeddings": True,
            "bos_token_id": None,
            "eos_token_id": 0,
            "pad_token_id": 0,
            **overrides,
        }
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Qwen2ForCausalLM(config)


def gpt2(seed: int = 0, **overrides: Any) -> GPT2LMHeadModel:
    config = GPT2Config(
        vocab_size=VOCAB, n_positions=32, n_embd=16, n_layer=2, n_head=2, initializer_range=0.4, **overrides
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return GPT2LMHeadModel(config)


class TinyQwen2(PolicySource):
    def __init__(self, dtype: torch.dtype = torch.float64, seed: int = 0, **overrides: Any) -> None:
        self.model = qwen2(seed, **overrides).to(dtype)

    def tokenizer(self) -> Any:
        return SimpleNamespace(eos_token_id=0)

    def config(self) -> Any:
        return self.model.config

    def build(self, options: PolicyOptions) -> Any:
        return copy.deepcopy(self.model)


class TinySource(TinyQwen2):
    """Its critic has the policy's precision, and a head that is not 0: values differ from token to token."""

    def build_critic(self, options: PolicyOptions) -> Any:
        return with_a_head(super().build_critic(options)).to(self.model.dtype)


def with_a_head(critic: Any, seed: int = 5) -> Any:
    generator = torch.Generator().manual_seed(seed)
    backbone = {id(parameter) for parameter in critic.base_model.parameters()}
    for parameter in critic.parameters():
        if id(parameter) not in backbone:
            parameter.data.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return critic


def qwen2_critic() -> Any:
    return with_a_head(TinyQwen2().build_critic(PolicyOptions())).double()


def gpt2_critic() -> Any:
    config = gpt2().config
    config.num_labels = 1
    torch.manual_seed(3)
    return with_a_head(GPT2ForTokenClassification(config)).double()


class TinyOPT(TinyQwen2):
    def __init__(self) -> None:
        self.model = OPTForCausalLM(
            OPTConfig(
                vocab_size=23,
                hidden_size=16,
                word_embed_proj_dim=16,
                num_hidden_layers=2,
                num_attention_heads=2,
                ffn_dim=24,
                max_position_embeddings=64,
                pad_token_id=0,
            )
        )
