"""The embedded engine: generation with transformers in this process, on any device."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from copy import deepcopy
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from ibro_lightning.batches.sequences import Sequences
from ibro_lightning.engines.base import RolloutEngine, Rows, check_length
from ibro_lightning.engines.probe import build, check_generation, in_float32
from ibro_lightning.engines.sampling import sample_tokens
from ibro_lightning.errors import ConfigError, RolloutError, check_count, is_number
from ibro_lightning.guards.memory_advice import engine_memory_advice
from ibro_lightning.models.spec import ModelSpec
from ibro_lightning.types import Dtype, FinishReason, Generation, SamplingParams, check_choice

CACHE_KEYS = ("layer_types", "sliding_window", "attention_chunk_size", "num_kv_shared_layers", "number_of_conv_states")
"""Config keys from which transformers builds a cache, for any architecture."""


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


class HFEngine(RolloutEngine):
    """Generates in left-padded batches with a key-value cache, computing each prompt once and dropping finished rows.

    Holds its own copy of the weights, as every engine does. Supports attention, linear attention, state spaces and
    hybrids of these. :meth:`setup` refuses models whose results with and without cache differ, see :mod:`.probe`.

    Args:
        max_batch_size: responses generated concurrently; bounds the memory of the key-value cache.
        dtype: of the engine's copy of the weights.
        compact_below: drop finished rows from the batch when the share of unfinished ones falls below this.
    """

    def __init__(self, max_batch_size: int = 256, dtype: Dtype = "float32", compact_below: float = 0.8) -> None:
        check_count("max_batch_size", max_batch_size, 1, " responses")
        check_choice("dtype", dtype, Dtype)
        if not (is_number(compact_below) and 0 < compact_below <= 1):
            raise ConfigError("compact_below", compact_below, "write a share above 0 and up to 1")
        self.dtype: Dtype = dtype
        self.max_batch_size, self.compact_below = max_batch_size, compact_below
        self.max_model_len: int | None = None
        self._model: Any = None
        self._eos: Tensor
        self._device: torch.device

    def setup(self, spec: ModelSpec) -> None:
        if self._model is not None:
            return
        model = build(spec, getattr(torch, self.dtype))
        trial = HFEngine()  # not type(self): the check is about transformers, not about a subclass
        trial._adopt(in_float32(model, spec), spec)
        check_generation(trial._model, trial._generate_batch, spec, trial.max_model_len)
        self._adopt(model, spec)

    def _adopt(self, model: Any, spec: ModelSpec) -> None:
        self._model = model
        self._cache_config = cache_config(model.config)
        self._takes_positions = "position_ids" in inspect.signature(model.forward).parameters
        self._takes_logits_to_keep = "logits_to_keep" in inspect.signature(model.forward).parameters
        positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        self.max_model_len = positions if positions and positions > 0 else None  # XLNet's -1 means any number
        self._eos = torch.tensor(spec.eos_token_ids, device=spec.device)
        self._device = spec.device

    @torch.no_grad()
    def load_weights(self, named_tensors: Iterable[tuple[str, Tensor]], *, partial: bool = False) -> None:
        own = self._model.state_dict()
        missing = {tensor.data_ptr(): name for name, tensor in own.items()}  # by storage: tied names count once
        for name, tensor in named_tensors:
            if name not in own:
                raise RolloutError(f"HFEngine: the model that the config builds has no weight {name!r}")
            if tensor.shape != own[name].shape:  # copy_ would broadcast
                shapes = f"{tuple(tensor.shape)}, not {tuple(own[name].shape)}"
                raise RolloutError(f"HFEngine: weight {name!r} has shape {shapes}")
            own[name].copy_(tensor)
            missing.pop(own[name].data_ptr(), None)
        if missing and not partial:
            summary = f"{len(missing)} weights, e.g. {min(missing.values())!r}"
            raise RolloutError(f"HFEngine got no new values for {summary}")

    @torch.no_grad()
    def generate(self, prompts: Rows, sampling: SamplingParams, seeds: Rows) -> list[list[Generation]]:
        if self._model is None:
            raise RuntimeError("HFEngine.setup(spec) and load_weights(...) must be called before generate(...)")
        check_length(prompts, sampling, self.max_model_len)
        results: list[list[Generation]] = [[] for _ in prompts]
        for batch in self._batches(prompts, seeds):
            indices = [index for index, _ in batch]
            longest = max(len(prompts[i]) for i in indices) + sampling.max_tokens
            responses = sum(len(own) for _, own in batch)
            with engine_memory_advice("max_batch_size", self.max_batch_size, responses, longest):
                generated = iter(self._generate_batch([prompts[i] for i in indices], sampling, [s for _, s in batch]))
            for index, batch_seeds in batch:
                results[index] += islice(generated, len(batch_seeds))
        return results

    def offload(self) -> None:
        if self._model is not None and self._device.type != "cpu":
            self._model.to("cpu")
            torch.cuda.empty_cache()

    def onload(self) -> None:
        if self._model is not None:
            self._model.to(self._device)

    def close(self) -> None:
        self._model = None

    def _batches(self, prompts: Rows, seeds: Rows) -> list[list[tuple[int, list[int]]]]:
        """Batches of ``(prompt index, seeds)`` with at most ``max_batch_size`` responses, sorted by prompt length."""
        batches: list[list[tuple[int, list[int]]]] = []
        free = 0
        for index in sorted(range(len(prompts)), key=lambda i: len(prompts[i])):
            remaining = list(seeds[index])
            while remaining:
                # Keep a prompt's samples in one batch if possible, because every batch recomputes the prompt.
                if free < min(len(remaining), self.max_batch_size):
                    batches.append([])
                    free = self.max_batch_size
                taken, remaining = remaining[:free], remaining[free:]
                batches[-1].append((index, taken))
                free -= len(taken)
        return batches

    def _generate_batch(self, prompts: Rows, sampling: SamplingParams, seeds: Rows) -> list[Generation]:
        """All samples of these prompts, ordered by prompt, then by seed. ``P`` prompts, ``R`` rows (samples)."""
        input_ids, attention_mask = self._left_pad(prompts)
        cache = DynamicCache(config=self._cache_config)
        logits = self._forward(input_ids, attention_mask, cache)  # [P, V]

        copies = torch.tensor([len(s) for s in seeds], device=self._device)
        source = torch.arange(len(prompts), device=self._device).repeat_interleave(copies)
        row_seeds = torch.tensor([seed for s in seeds for seed in s], dtype=torch.long, device=self._device)
        tokens = torch.zeros(len(source), sampling.max_tokens, dtype=torch.long, device=self._device)
        logps = torch.zeros(len(source), sampling.max_tokens, device=self._device)
        lengths = torch.zeros_like(source)
        ended = torch.zeros_like(source, dtype=torch.bool)

        select_rows(cache, source)
        logits, attention_mask = logits[source], attention_mask[source]
        eos = torch.cat([self._eos, self._eos.new_tensor(sampling.stop_token_ids)])
        rows = torch.arange(len(source), device=self._device)  # [B] sample of each row of the shrinking batch
        for step in range(sampling.max_tokens):
            next_tokens, next_logp = sample_tokens(logits, sampling, row_seeds[rows], step)
            live = ~ended[rows]
            tokens[rows[live], step], logps[rows[live], step] = next_tokens[live], next_logp[live]
            lengths[rows[live]] += 1
            ended[rows] |= torch.isin(next_tokens, eos) & live
            live = ~ended[rows]
            num_live = int(live.sum())
            if num_live == 0 or step + 1 == sampling.max_tokens:
                break
            if num_live < self.compact_below * len(rows):
                keep = live.nonzero().squeeze(-1)
                select_rows(cache, keep)
                rows, next_tokens, attention_mask = rows[keep], next_tokens[keep], attention_mask[keep]
            attention_mask = torch.cat([attention_mask, attention_mask.new_ones(len(rows), 1)], dim=1)
            logits = self._forward(next_tokens[:, None], attention_mask, cache)
        reasons: list[FinishReason] = ["stop" if done else "length" for done in ended.tolist()]
        responses = zip(tokens.tolist(), logps.tolist(), lengths.tolist(), reasons, strict=True)
        return [Generation(tuple(ids[:size]), tuple(logp[:size]), reason) for ids, logp, size, reason in responses]

    def _left_pad(self, prompts: Rows) -> tuple[Tensor, Tensor]:
        """``[P, L]`` ids and mask, padded on the left so that the last position predicts every row's next token."""
        padded = Sequences.collate(prompts, [()] * len(prompts), padding_side="left").to(self._device)
        return padded.input_ids, padded.attention_mask

    def _forward(self, input_ids: Tensor, attention_mask: Tensor, cache: DynamicCache) -> Tensor:
        """``[B, V]`` logits of the next token; ``input_ids`` are the tokens not yet in the cache."""
        kwargs: dict[str, Any] = {}
        if self._takes_positions:
            positions = attention_mask.cumsum(dim=1) - 1
            kwargs["position_ids"] = positions[:, -input_ids.shape[1] :].clamp(min=0)
        if self._takes_logits_to_keep:
            kwargs["logits_to_keep"] = 1
        kwargs |= {"input_ids": input_ids, "attention_mask": attention_mask, "past_key_values": cache}
        return self._model(**kwargs, use_cache=True).logits[:, -1]
