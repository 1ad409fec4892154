"""The embedded engine: generation with transformers in this process, on any device."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from itertools import accumulate, islice
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ibro_lightning.batches.sequences import Sequences
from ibro_lightning.engines.base import RolloutEngine, Rows, check_length
from ibro_lightning.engines.hf_batch import Batch, GrowingBatch, Network
from ibro_lightning.engines.hf_responses import Responses
from ibro_lightning.engines.probe import build, check_generation, in_float32
from ibro_lightning.errors import ConfigError, RolloutError
from ibro_lightning.guards.memory_advice import engine_memory_advice
from ibro_lightning.models.spec import ModelSpec
from ibro_lightning.types import Dtype, Generation, SamplingParams


REFILL_BELOW = 0.85
"""Share of ``max_batch_size`` below which samples of further prompts join: a forward pass of a few prompts costs as much
as a step, so they join several at a time."""


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
    hybrids of these. :meth:`setup` tries the kinds of :class:`.Batch`, the fast one first, and refuses models whose
    results with and without cache differ in all of them, see :mod:`.probe`.

    Args:
        max_batch_size: responses generated concurrently; bounds the memory of the key-value cache.
        dtype: of the engine's copy of the weights.
        compact_below: drop finished rows from the batch when the share of unfinished ones falls below this.
    """

    def __init__(self, max_batch_size: int = 256, dtype: Dtype = "float32", compact_below: float = 0.8) -> None:
        if max_batch_size < 1:
            raise ConfigError("max_batch_size", max_batch_size, "write 1 or more responses")
        if not 0 < compact_below <= 1:
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
        tested = in_float32(model, spec)
        kinds = [kind for kind in (GrowingBatch, Batch) if kind.adopt(Network(tested))]
        for kind in kinds:
            trial = HFEngine()  # not type(self): the check is about transformers, not about a subclass
            trial._adopt(tested, spec, kind)
            try:
                check_generation(tested, trial._generate, spec, trial.max_model_len)
                break
            except ConfigError:
                if kind is kinds[-1]:
                    raise
        self._adopt(model, spec, kind)

    def _adopt(self, model: Any, spec: ModelSpec, batch_type: type[Batch]) -> None:
        self._model, self._network, self._batch_type = model, Network(model), batch_type
        batch_type.adopt(self._network)
        self.max_model_len = self._network.max_length
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

    @torch.inference_mode()
    def generate(self, prompts: Rows, sampling: SamplingParams, seeds: Rows) -> list[list[Generation]]:
        if self._model is None:
            raise RuntimeError("HFEngine.setup(spec) and load_weights(...) must be called before generate(...)")
        check_length(prompts, sampling, self.max_model_len)
        longest = max(map(len, prompts), default=0) + sampling.max_tokens
        with engine_memory_advice("max_batch_size", self.max_batch_size, sum(map(len, seeds)), longest):
            samples = iter(self._generate(prompts, sampling, seeds))
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

    def _generate(self, prompts: Rows, sampling: SamplingParams, seeds: Rows) -> list[Generation]:
        """All samples, ordered by prompt, then by seed."""
        waiting = self._groups(prompts, seeds)
        ends = torch.cat([self._eos, self._eos.new_tensor(sampling.stop_token_ids)])
        responses = Responses(sampling, ends, self.compact_below)
        while waiting or responses.rows:
            joins = self._batch_type.joinable and responses.rows < REFILL_BELOW * self.max_batch_size
            if joins or not responses.rows:
                groups = _take(waiting, self.max_batch_size - responses.rows)
                if groups:
                    batch, logits = self._prefill([prompts[group.prompt] for group in groups])
                    copies = self._tensor([len(group.seeds) for group in groups])
                    samples = self._tensor([group.first + i for group in groups for i in range(len(group.seeds))])
                    row_seeds = self._tensor([seed for group in groups for seed in group.seeds])
                    responses.add(batch, logits, copies, samples, row_seeds)
            responses.step()
        return responses.finished()

    def _groups(self, prompts: Rows, seeds: Rows) -> deque[Group]:
        """The samples of each prompt, in parts of at most ``max_batch_size``; sorted by prompt length."""
        firsts = list(accumulate(map(len, seeds), initial=0))
        return deque(
            Group(index, firsts[index] + part, list(seeds[index][part : part + self.max_batch_size]))
            for index in sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
            for part in range(0, len(seeds[index]), self.max_batch_size)
        )

    def _prefill(self, prompts: Rows) -> tuple[Batch, Tensor]:
        """The prompts, and the logits ``[P, V]`` of their next tokens."""
        return self._batch_type.start(self._network, *self._left_pad(prompts))

    def _left_pad(self, prompts: Rows) -> tuple[Tensor, Tensor]:
        """``[P, L]`` ids and mask, padded on the left so that the last position predicts every row's next token."""
        padded = Sequences.collate(prompts, [()] * len(prompts), padding_side="left").to(self._device)
        return padded.input_ids, padded.attention_mask

    def _tensor(self, numbers: list[int]) -> Tensor:
        return torch.tensor(numbers, dtype=torch.long, device=self._device)


def _take(waiting: deque[Group], free: int) -> list[Group]:
    """The next groups that fit into ``free`` rows, taken from those that wait. A prompt's samples stay together,
    because it would be computed again for those that come later."""
    taken: list[Group] = []
    while waiting and len(waiting[0].seeds) <= free:
        taken.append(waiting.popleft())
        free -= len(taken[-1].seeds)
    return taken
