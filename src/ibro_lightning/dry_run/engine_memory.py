"""Memory of one rank's engine: its copy of the weights, the key-value cache, temporaries of sampling a token."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch

from ibro_lightning.dry_run.layout import GIB, Layout
from ibro_lightning.dry_run.shadow import ShadowMemory
from ibro_lightning.engines import EngineProcess, HFEngine, VLLMEngine, VLLMServerEngine
from ibro_lightning.engines.base import RolloutEngine
from ibro_lightning.engines.sampling import sample_tokens
from ibro_lightning.engines.vllm_build import CPU_CACHE_GIB, check_one_process
from ibro_lightning.models.tensor_parallel import head_dim
from ibro_lightning.types import SamplingParams


@dataclass(frozen=True)
class EngineMemory:
    """Bytes on one rank.

    Args:
        weights: the engine's copy.
        cache: keys and values of prompts and responses.
        work: temporaries of computing and sampling the next token.
        dtype: of the weights.
        stays: whether the weights stay during the update.
        dropped: whether they are discarded otherwise, and not moved to host memory.
        overlaps: whether responses are generated during the update.
        in_transit: the copy in which new weights reach an engine in another process, in host memory.
        note: explains the figures where necessary.
        refused: why the engine would not start; None if it would.
        unknown: why there are no figures; None if there are.
    """

    weights: int = 0
    cache: int = 0
    work: int = 0
    dtype: str = "bfloat16"
    stays: bool = False
    dropped: bool = False
    overlaps: bool = False
    in_transit: int = 0
    note: str = ""
    refused: str | None = None
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
        dtype=engine.dtype,
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
    settings, dtype, on_cpu = engine.settings, getattr(torch, engine.dtype), layout.device == "cpu"
    check_one_process(settings, layout.device, layout.world)
    weights = parameters * dtype.itemsize // settings.tensor_parallel_size
    per_token = cache_bytes_per_token(config, dtype) // settings.tensor_parallel_size
    longest = engine.max_model_len or int(getattr(config.get_text_config(), "max_position_embeddings", None) or 1)
    found = EngineMemory(weights, dtype=engine.dtype, stays=on_cpu, dropped=not on_cpu)
    gib = CPU_CACHE_GIB if settings.kv_cache_gib is None and on_cpu else settings.kv_cache_gib
    if gib is not None:
        found = replace(found, cache=int(gib * GIB), note="vLLM's own work not counted")
        setting, remedy = f"data.engine.kv_cache_gib: {gib:g}", f"write {-(-longest * per_token // GIB)} or more"
    elif layout.memory is None:
        note = f"and a cache that fills {settings.gpu_memory_utilization:.0%} of the device, whose size is not known"
        return replace(found, note=note)
    else:
        share = settings.gpu_memory_utilization
        cache = max(0, int(share * layout.memory) - weights)
        note = f"gpu_memory_utilization: {share}, about {cache // per_token:,} cached tokens"
        found, setting = replace(found, cache=cache, note=note), f"data.engine.gpu_memory_utilization: {share}"
        needed = math.ceil(100 * (weights + longest * per_token) / layout.memory) / 100
        remedy = f"write {needed:g} or more" if needed < 1 else "take VLLMServerEngine, on devices of its own"
    if found.cache < longest * per_token:
        what = f"vLLM would not start, as {setting} leaves {found.cache / GIB:.1f} GiB for its cache beside "
        what += f"{weights / GIB:.1f} GiB of weights, and one response of {longest:,} tokens takes "
        found = replace(found, refused=f"{what}{longest * per_token / GIB:.1f} GiB: {remedy}, or lower max_model_len")
    return found
