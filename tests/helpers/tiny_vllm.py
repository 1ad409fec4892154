"""Tiny models, the plain model's answers, and a real vLLM engine for the tests in this folder."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from copy import deepcopy
from functools import cache
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config

from ibro_lightning.batches.sequences import Sequences
from ibro_lightning.engines import HFEngine, VLLMEngine
from ibro_lightning.engines.base import RolloutEngine
from ibro_lightning.models import Policy
from ibro_lightning.models.spec import ModelSpec
from ibro_lightning.types import Dtype, Generation, SamplingParams

torch.set_num_threads(1)

MAX_LEN = 512
SIZES: dict[str, Any] = {
    # vLLM's attention on CPUs takes heads of 32, 64, 80, ... numbers.
    "hidden_size": 64,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "num_hidden_layers": 2,
    "intermediate_size": 96,
    "max_position_embeddings": MAX_LEN,
    # Ten times the usual: distributions with peaks, to which positions and context matter.
    "initializer_range": 0.3,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
CONFIGS = {
    # 61: vLLM pads vocabularies to a multiple of 64, and must not show it.
    "tied": lambda: Qwen2Config(**SIZES, vocab_size=61, tie_word_embeddings=True),
    "untied": lambda: LlamaConfig(**SIZES, vocab_size=64, tie_word_embeddings=False),
}
OTHER_EOS = 5
CONFIGS_WITH_EOS = {
    "tied_with_eos": lambda: Qwen2Config(
        **{**SIZES, "eos_token_id": OTHER_EOS}, vocab_size=61, tie_word_embeddings=True
    )
}
EOS = (1, 2, 3)
NEVER = ()  # vLLM refuses ids outside the vocabulary
# Of different lengths, one of a single token, one twice, one with token 0, and one of many blocks of vLLM's cache, so
# that samples share a cached prefix.
LONG = [(7 * n * n + 3 * n) % 60 for n in range(300)]
PROMPTS = [[5, 9, 11], [7], [1, 2, 3, 4, 5, 6, 7, 8, 9], [30, 0, 0, 12, 13], LONG, [7]]


@cache
def tiny_model(name: str, seed: int = 0) -> Any:
    """A float32 model; do not change it, other tests share it (see :func:`changeable`)."""
    return changeable(name, seed)


def changeable(name: str, seed: int = 0, dtype: torch.dtype = torch.float32) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config({**CONFIGS, **CONFIGS_WITH_EOS}[name](), dtype=torch.float32).eval()
        for parameter in model.parameters():  # biases of 0 and norms of 1 would not be missed
            if parameter.dim() == 1:
                parameter.data += 0.2 * torch.randn_like(parameter)
    return changed_to(model, dtype)


def changed_to(model: Any, dtype: torch.dtype) -> Any:
    """A copy with weights of another dtype; the rotary embedding's buffers stay in float32, as transformers loads."""
    model = deepcopy(model)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model


def perturb(model: Any, seed: int, relative: float) -> None:
    """Change every weight by noise of ``relative`` times its own size, as an optimizer step might."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
            parameter += relative * parameter.pow(2).mean().sqrt() * noise


def spec_of(model: Any, eos: Sequence[int] = EOS) -> ModelSpec:
    return ModelSpec(model.config, tuple(eos), torch.device("cpu"))


SETTINGS: dict[str, Any] = {
    "dtype": "float32",
    "enforce_eager": True,
    "kv_cache_gib": 0.05,
    "gpu_memory_utilization": 0.3,
    "max_num_seqs": 64,
}


def vllm_engine(cls: type[VLLMEngine] = VLLMEngine, **settings: Any) -> VLLMEngine:
    return cls(**{**SETTINGS, **settings})


def hf_engine(model: Any, eos: Sequence[int] = EOS, dtype: Dtype = "float32") -> HFEngine:
    engine = HFEngine(dtype=dtype)
    engine.setup(spec_of(model, eos or (10**6,)))
    engine.load_weights(weights_of(model))
    return engine


def weights_of(model: Any) -> Iterable[tuple[str, Tensor]]:
    return model.state_dict().items()


@torch.no_grad()
def reference_logits(model: Any, ids: Sequence[int]) -> Tensor:
    """``[L, V]``: one sequence, no padding, no cache, no explicit positions."""
    return model(input_ids=torch.tensor([list(ids)]), use_cache=False).logits[0].float()


def reference_logp(model: Any, prompt: Sequence[int], response: Sequence[int], temperature: float = 1.0) -> Tensor:
    logits = reference_logits(model, [*prompt, *response])[len(prompt) - 1 : -1]
    logp = (logits / temperature).log_softmax(dim=-1)
    return logp.gather(-1, torch.tensor(response)[:, None]).squeeze(-1)


def next_logp(model: Any, prompt: Sequence[int], temperature: float = 1.0) -> Tensor:
    """``[V]`` log-probs of the token after ``prompt``."""
    return (reference_logits(model, prompt)[-1] / temperature).log_softmax(dim=-1)


def largest_difference(
    model: Any,
    prompts: Sequence[Sequence[int]],
    generated: Sequence[Sequence[Generation]],
    temperature: float = 1.0,
) -> float:
    """Largest |Δlogp| between what an engine reported and the plain model."""
    differences = [
        (torch.tensor(sample.logp) - reference_logp(model, prompt, sample.token_ids, temperature)).abs().max().item()
        for prompt, samples in zip(prompts, generated, strict=True)
        for sample in samples
    ]
    assert differences
    return max(differences)


def difference(
    engine: RolloutEngine, model: Any, prompts: Sequence[Sequence[int]] = PROMPTS, samples: int = 2, tokens: int = 6
) -> float:
    """How far an engine is from ``model`` on samples of its own."""
    seeds = [[100 * index + sample for sample in range(samples)] for index in range(len(prompts))]
    return largest_difference(model, prompts, engine.generate(prompts, SamplingParams(max_tokens=tokens), seeds))


def tokens_of(generations: Sequence[Sequence[Generation]]) -> list[list[tuple[int, ...]]]:
    return [[sample.token_ids for sample in samples] for samples in generations]


def logps_of(generations: Sequence[Sequence[Generation]]) -> Tensor:
    """All log-probs in a row."""
    return torch.tensor([logp for samples in generations for sample in samples for logp in sample.logp])


class Provider:
    """What a module offers to a datamodule, without Lightning."""

    tokenizer = None
    eos_token_ids = EOS
    min_group_size = 1

    def __init__(self, model: Any, dtype: Dtype = "float32") -> None:
        self.compute_dtype: Dtype = dtype
        self.policy = Policy(model)
        self._steps = 0

    def model_spec(self) -> ModelSpec:
        return spec_of(self.policy.model)

    def named_full_weights(self) -> Iterator[tuple[str, Tensor]]:
        return self.policy.named_full_weights()

    @torch.no_grad()
    def response_logp(self, sequences: Sequences, temperature: float) -> Tensor:
        return self.policy(sequences, temperature=temperature, with_entropy=False)[0]

    def step(self, relative: float = 0.1) -> None:
        """Move like an optimizer."""
        self._steps += 1
        perturb(self.policy.model, self._steps, relative)
