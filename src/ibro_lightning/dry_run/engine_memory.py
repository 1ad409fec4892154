"""Memory of one rank's engine: its copy of the weights, the key-value cache, temporaries of sampling a token."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from ibro_lightning.dry_run.layout import GIB, Layout
from ibro_lightning.dry_run.shadow import ShadowMemory
from ibro_lightning.engines import EngineProcess, HFEngine, VLLMEngine, VLLMServerEngine
from ibro_lightning.engines.base import RolloutEngine
from ibro_lightning.engines.sampling import sample_tokens
from ibro_lightning.engines.vllm_build import CPU_CACHE_GIB
from ibro_lightning.models.tensor_parallel import head_dim
from ibro_lightning.types import SamplingParams


@dataclass(frozen=True)
class EngineMemory:
    """Bytes on one rank.

    Args:
        weights: the engine's copy.
        cache: keys and values of prompts and responses.
        work: temporaries of computing and sampling the next token.
        stays: whether the weights stay during the update.
        overlaps: whether responses are generated during the update.
        in_transit: the copy in which new weights reach an engine in another process, in host memory.
        note: explains the figures where necessary.
        unknown: why there are no figures; None if there are.
    """

    weights: int = 0
    cache: int = 0
    work: int = 0
    stays: bool = False
    overlaps: bool = False
    in_transit: int = 0
    note: str = ""
    unknown: str | None = None

    def in_another_process(self, in_transit: int, *, overlaps: bool) -> EngineMemory:
        """The same in a process of its own."""
        return replace(self, stays=self.stays or overlaps, overlaps=overlaps, in_transit=in_transit)

    @property
    def total(self) -> int:
        return self.weights + self.cache + self.work


def engine_memory(
    engine: RolloutEngine,
    config: Any,
    parameters: int,
    sampling: SamplingParams,
    layout: Layout,
    *,
    prompt: int,
    group_size: int,
    responses: int,
) -> EngineMemory:
    """Memory of generation on one rank.

    Args:
        config, parameters: the model's, tied parameters counted once.
        prompt: tokens of the longest prompt.
        group_size: responses per prompt.
        responses: that this rank generates in one round.
    """
    if isinstance(engine, EngineProcess):
        engine = engine.engine
    if isinstance(engine, VLLMEngine):
        return _vllm(engine, config, parameters, layout)
    if isinstance(engine, VLLMServerEngine):
        return EngineMemory(note="on the server, which the dry run does not ask")
    if not isinstance(engine, HFEngine):
        return EngineMemory(unknown=f"a dry run cannot estimate {type(engine).__name__}, only HFEngine and VLLMEngine")
    dtype, text, rows = getattr(torch, engine.dtype), config.get_text_config(), min(engine.max_batch_size, responses)
    tokens = rows * (prompt + sampling.max_tokens)
    # A layer's keys and values are copied when they grow.
    growing = tokens * _cache_bytes_per_layer(config, dtype)
    with ShadowMemory(layout.device) as memory, torch.no_grad():
        logits = torch.zeros(rows, text.vocab_size, dtype=dtype)
        sample_tokens(logits, sampling, torch.zeros(rows, dtype=torch.long), 0)
    prefilled = -(-rows // group_size) * prompt
    wide = 4 * text.hidden_size + 3 * (getattr(text, "intermediate_size", None) or 4 * text.hidden_size)
    return EngineMemory(
        weights=parameters * dtype.itemsize,
        cache=tokens * cache_bytes_per_token(config, dtype),
        work=max(memory.peak, prefilled * wide * dtype.itemsize) + growing,
        stays=layout.device == "cpu",
        note=f"{rows} responses at a time",
    )


def cache_bytes_per_token(config: Any, dtype: torch.dtype) -> int:
    """Bytes of one token's keys and values in all layers."""
    return int(config.get_text_config().num_hidden_layers) * _cache_bytes_per_layer(config, dtype)


def _cache_bytes_per_layer(config: Any, dtype: torch.dtype) -> int:
    text = config.get_text_config()
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    return 2 * heads * head_dim(config) * dtype.itemsize


def _vllm(engine: VLLMEngine, config: Any, parameters: int, layout: Layout) -> EngineMemory:
    settings, dtype = engine.settings, getattr(torch, engine.dtype)
    weights = parameters * dtype.itemsize // settings.tensor_parallel_size
    gib = settings.kv_cache_gib
    if gib is None and layout.device == "cpu":
        gib = CPU_CACHE_GIB
    if gib is not None:
        return EngineMemory(weights, int(gib * GIB), stays=layout.device == "cpu", note="vLLM's own work not counted")
    share = settings.gpu_memory_utilization
    if layout.memory is None:
        return EngineMemory(weights, note=f"and a cache that fills {share:.0%} of the device, whose size is not known")
    cache = int(share * layout.memory) - weights
    if cache <= 0:
        return EngineMemory(weights, note=f"more than gpu_memory_utilization: {share} allows: vLLM will not start")
    per_token = cache_bytes_per_token(config, dtype) // settings.tensor_parallel_size
    return EngineMemory(
        weights, cache, note=f"gpu_memory_utilization: {share}, about {cache // per_token} cached tokens"
    )
