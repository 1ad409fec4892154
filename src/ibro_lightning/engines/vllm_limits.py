"""What vLLM refuses, replaces or dies of, in a process or in a server; refused here before it gets there."""

from __future__ import annotations

from ibro_lightning.engines.base import Rows, check_length
from ibro_lightning.errors import ConfigError
from ibro_lightning.types import SamplingParams

MIN_TEMPERATURE, MAX_TEMPERATURE = 0.01, 2.0
"""Range of temperatures that vLLM 0.32 supports."""


def check_temperature(sampling: SamplingParams, setting: str) -> None:
    """Raise :class:`ConfigError` for temperatures that vLLM rejects or silently replaces."""
    remedy = ""
    if 0 < sampling.temperature < MIN_TEMPERATURE:
        remedy = f"vLLM would sample at {MIN_TEMPERATURE}: write that or more, or 0 (greedy, evaluation only)"
    elif sampling.temperature > MAX_TEMPERATURE:
        limit = f"{MAX_TEMPERATURE:g}"
        remedy = f"vLLM refuses temperatures above {limit}: write {limit} or less, or take HFEngine"
    if remedy:
        raise ConfigError(f"{setting}.temperature", sampling.temperature, remedy)


def check_prompts(prompts: Rows, sampling: SamplingParams, limit: int | None, vocab_size: int, advice: str) -> None:
    """Raise :class:`ConfigError` for prompts that are too long or have token ids that the model lacks."""
    check_length(prompts, sampling, limit, advice=advice)
    if unknown := [token for prompt in prompts for token in prompt if not 0 <= token < vocab_size]:
        remedy = f"a prompt holds it, but the model has {vocab_size} tokens: the tokenizer is another model's"
        raise ConfigError("policy", f"token id {unknown[0]}", remedy)
