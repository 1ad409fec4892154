"""The embedded engine: generation with transformers in this process, on any device."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import replace
from itertools import accumulate, islice
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ibro_lightning.batches.sequences import Sequences
from ibro_lightning.engines.base import RolloutEngine, Rows, check_length
from ibro_lightning.engines.hf_batch import Batch, GrowingBatch, Network
from ibro_lightning.engines.hf_check import build, check_generation, in_float32
from ibro_lightning.engines.hf_responses import Responses
from ibro_lightning.errors import ConfigError, RolloutError, check_count, is_number
from ibro_lightning.guards.memory_advice import engine_memory_advice
from ibro_lightning.models.spec import ModelSpec, check_dtype
from ibro_lightning.types import Dtype, Generation, SamplingParams

PASSED: set[tuple[type[Batch], str]] = set()
"""Checks that this process need not repeat: a run sets its engine up again to evaluate its final policy."""
REFILL_BELOW = 0.75
"""Share of ``max_batch_size`` below which samples of further prompts join. Several join at a time, because computing a
few prompts costs as much as a step, and moves the batch's cache."""


class Group(NamedTuple):
    """Samples of one prompt that are generated together."""

    prompt: int
    first: int
    """Number of the first sample among all of the call; the others follow."""
    seeds: list[int]


class HFEngine(RolloutEngine):
    """Generates in left-padded batches with a key-value cache, computing each prompt once. Finished rows leave the
    batch, and samples of the next prompts take their places.

    Holds its own copy of the weights, as every engine does. Supports attention, linear attention, state spaces and
    hybrids of these. :meth:`setup` tries whether a :class:`.GrowingBatch` gives the results of the model without a
    cache, see :mod:`.hf_check`, then whether the slower :class:`.Batch` does, and otherwise refuses the model.

    Args:
        max_batch_size: responses generated concurrently; bounds the memory of the key-value cache to this many rows of
            the longest prompt and ``max_tokens``, also when others join.
        dtype: of the engine's copy of the weights.
        compact_below: drop finished rows from the batch when the share of unfinished ones falls below this; 1 drops
            them at once. Those that stay take memory, too, up to ``max_tokens`` more for every row.
    """

    def __init__(self, max_batch_size: int = 256, dtype: Dtype = "float32", compact_below: float = 1.0) -> None:
        check_count("max_batch_size", max_batch_size, 1, " responses")
        check_dtype("dtype", dtype)
        if not (is_number(compact_below) and 0 < compact_below <= 1):
            raise ConfigError("compact_below", compact_below, "write a share above 0 and up to 1")
        self.dtype: Dtype = dtype
        self.max_batch_size, self.compact_below = max_batch_size, compact_below
        self.max_model_len: int | None = None
        self._model: Any = None
        self._network: Network
        self._batch_type: type[Batch]
        self._eos: Tensor
        self._device: torch.device

    def setup(self, spec: ModelSpec) -> None:
        if self._model is not None:
            return
        model = build(spec, getattr(torch, self.dtype))
        self._adopt(model, spec, _batch_type(in_float32(model, spec), spec))

    def _adopt(self, model: Any, spec: ModelSpec, batch_type: type[Batch]) -> None:
        self._model, self._network, self._batch_type = model, Network(model), batch_type
        batch_type.adopt(self._network)
        self.max_model_len = self._network.max_length
        self._eos = torch.tensor(spec.eos_token_ids, dtype=torch.long, device=spec.device)
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

    @torch.inference_mode()
    def generate(self, prompts: Rows, sampling: SamplingParams, seeds: Rows) -> list[list[Generation]]:
        if self._model is None:
            raise RuntimeError("HFEngine.setup(spec) and load_weights(...) must be called before generate(...)")
        check_length(prompts, sampling, self.max_model_len)
        longest = max(map(len, prompts), default=0) + sampling.max_tokens
        with engine_memory_advice("max_batch_size", self.max_batch_size, sum(map(len, seeds)), longest):
            samples = iter(self._generate(prompts, sampling, seeds, self.max_batch_size))
        return [list(islice(samples, len(own))) for own in seeds]

    def offload(self) -> None:
        if self._model is not None and self._device.type != "cpu":
            self._model.to("cpu")
            torch.cuda.empty_cache()

    def onload(self) -> None:
        if self._model is not None:
            self._model.to(self._device)

    def close(self) -> None:
        self._model = None

    def _generate(self, prompts: Rows, sampling: SamplingParams, seeds: Rows, at_once: int) -> list[Generation]:
        """All samples, ordered by prompt, then by seed; ``at_once`` responses at a time."""
        waiting = _groups(prompts, seeds, at_once)
        ends = torch.cat([self._eos, self._eos.new_tensor(sampling.stop_token_ids)])
        responses = Responses(sampling, ends, self.compact_below)
        while waiting or responses.rows:
            may_join = self._batch_type.joinable and responses.rows < REFILL_BELOW * at_once
            if may_join or not responses.rows:
                self._begin(_take(waiting, at_once - responses.rows), prompts, responses)
            responses.step()
        return responses.finished()

    def _begin(self, groups: list[Group], prompts: Rows, responses: Responses) -> None:
        """Begin the responses of ``groups``."""
        if not groups:
            return
        batch, logits = self._prefill([prompts[group.prompt] for group in groups])
        copies, samples, seeds = (
            torch.tensor(numbers, dtype=torch.long, device=self._device)
            for numbers in (
                [len(group.seeds) for group in groups],
                [group.first + sample for group in groups for sample in range(len(group.seeds))],
                [seed for group in groups for seed in group.seeds],
            )
        )
        responses.add(batch, logits, copies, samples, seeds)

    def _prefill(self, prompts: Rows) -> tuple[Batch, Tensor]:
        """The prompts, and the logits ``[P, V]`` of their next tokens."""
        return self._batch_type.start(self._network, *self._left_pad(prompts))

    def _left_pad(self, prompts: Rows) -> tuple[Tensor, Tensor]:
        """``[P, L]`` ids and mask, padded on the left so that the last position predicts every row's next token."""
        padded = Sequences.collate(prompts, [()] * len(prompts), padding_side="left").to(self._device)
        return padded.input_ids, padded.attention_mask


def _batch_type(model: Any, spec: ModelSpec) -> type[Batch]:
    """The fastest batch in which ``model``, whose weights this changes, generates correctly.

    Raises:
        ConfigError: there is none.
    """
    if model.dtype == torch.float32:  # in others the check finds errors, but not wrong numbers
        with suppress(ConfigError):
            _check(GrowingBatch, model, spec)
            return GrowingBatch
    _check(Batch, model, spec)
    return Batch


def _check(batch_type: type[Batch], model: Any, spec: ModelSpec) -> None:
    """Raise :class:`ConfigError` unless ``model`` generates correctly in such batches.

    Its weights are random ones from a fixed seed, so that a second model of the same kind need not be checked."""
    kind = batch_type, _kind(model)
    if kind in PASSED:
        return
    trial = HFEngine()  # not a subclass: the check is about transformers
    trial._adopt(model, replace(spec, eos_token_ids=()), batch_type)  # the check chooses where responses end
    conclusive = check_generation(model, trial._generate, spec, trial.max_model_len)
    if conclusive and not spec.trust_remote_code:  # whose code may be another folder's
        PASSED.add(kind)


def _kind(model: Any) -> str:
    """All that decides how a model of transformers computes, but for its weights."""
    config = model.config
    kernels = [getattr(config, f"_{part}_implementation", None) for part in ("attn", "experts")]
    return f"{type(model)} {model.device} {model.dtype} {kernels} {config.to_dict()}"


def _groups(prompts: Rows, seeds: Rows, at_once: int) -> deque[Group]:
    """The samples of each prompt, in parts of at most ``at_once``; sorted by prompt length."""
    firsts = list(accumulate(map(len, seeds), initial=0))
    return deque(
        Group(index, firsts[index] + part, list(seeds[index][part : part + at_once]))
        for index in sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        for part in range(0, len(seeds[index]), at_once)
    )


def _take(waiting: deque[Group], free: int) -> list[Group]:
    """The next groups that fit into ``free`` rows, taken from those that wait. A prompt's samples stay together,
    because it would be computed again for those that come later."""
    taken: list[Group] = []
    while waiting and len(waiting[0].seeds) <= free:
        taken.append(waiting.popleft())
        free -= len(taken[-1].seeds)
    return taken
