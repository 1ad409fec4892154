"""What the parts of the framework hand to each other. Modules and datamodules meet here and nowhere else.

As the data walks one iteration: ``Problem`` (a source's text) → ``Prompt`` (its tokens) → ``Generation`` (the engine's
tokens) → ``Completion`` (with text) → ``RewardResult`` → ``Rollout`` (one Lightning batch) → ``Experience`` (what one
update needs, in :mod:`.experience`). Shapes: ``B`` responses, ``L`` prompt + response tokens, ``T`` response tokens,
padded.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, Self

import torch
from torch import Tensor

from ibro_lightning.responses import (
    Completion,
    Dtype,
    FinishReason,
    Generation,
    Group,
    Message,
    Problem,
    Prompt,
    RewardResult,
    SamplingParams,
)
from ibro_lightning.sequences import Sequences, to_device

__all__ = [
    "Completion",
    "Dtype",
    "FinishReason",
    "Generation",
    "Group",
    "Message",
    "ModelSpec",
    "PolicyProvider",
    "Problem",
    "Prompt",
    "RewardResult",
    "Rollout",
    "RolloutEngine",
    "SamplingParams",
]


@dataclass(frozen=True)
class Rollout:
    """One Lightning batch: responses sampled from the current policy, with their rewards. With several ranks, this
    rank's share of them, in whole groups.

    Tensors are ``[B]`` unless said otherwise; ``prompts``, ``completions`` and ``results`` are the same rows for
    people and callbacks. ``groups`` numbers the prompt that each response answers, 0..G-1 over all ranks. ``metrics``
    says how generation went, on all ranks.
    """

    prompts: tuple[Prompt, ...]
    completions: tuple[Completion, ...]
    sequences: Sequences
    sampler_logp: Tensor
    """``[B, T]`` log-probs the engine sampled with; 0 on padding."""
    rewards: Tensor
    reward_parts: Mapping[str, Tensor]
    results: tuple[RewardResult, ...]
    groups: Tensor
    truncated: Tensor
    """bool: cut at the length limit, no EOS."""
    late: Tensor
    """bool: cut by the engine's deadline; never trained on."""
    name: str
    """"train", or the evaluation set's name."""
    iteration: int
    temperature: float
    dropped: tuple[Group, ...] = ()
    """Groups that were sampled but are not trained on (dynamic sampling); for the record."""
    skip_update: bool = False
    """Dynamic sampling found no group to learn from: the rows are for the record only."""
    metrics: Mapping[str, float] = field(default_factory=dict)
    total_groups: int | None = None
    """G, over all ranks; None: the groups that are here are all."""
    stands_in: bool = False
    """The rows stand for nothing: this rank has no share of the rollout, and takes part in the others' collectives."""

    @classmethod
    def from_groups(cls, groups: Sequence[Group], numbers: Sequence[int] | None = None, **others: Any) -> Self:
        """Build from whole groups, which are number 0, 1, … of the rollout, or those of ``numbers``; ``others`` are the
        remaining fields (name, iteration, temperature, …)."""
        numbers = range(len(groups)) if numbers is None else numbers
        rows = [
            (i, g.prompt, c, r)
            for i, g in zip(numbers, groups, strict=True)
            for c, r in zip(g.completions, g.results, strict=True)
        ]
        completions = tuple(completion for _, _, completion, _ in rows)
        sequences = Sequences.collate([p.token_ids for _, p, _, _ in rows], [c.token_ids for c in completions])
        sampler_logp = torch.zeros(sequences.response_mask.shape)
        for row, completion in enumerate(completions):
            sampler_logp[row, : len(completion.logp)] = torch.tensor(completion.logp)
        results = [result for _, _, _, result in rows]
        names = dict.fromkeys(name for result in results for name in result.parts)
        return cls(
            prompts=tuple(prompt for _, prompt, _, _ in rows),
            completions=completions,
            sequences=sequences,
            sampler_logp=sampler_logp,
            rewards=torch.tensor([float(result.reward) for result in results]),
            reward_parts={name: torch.tensor([float(r.parts.get(name, 0.0)) for r in results]) for name in names},
            results=tuple(results),
            groups=torch.tensor([index for index, _, _, _ in rows], dtype=torch.long),
            truncated=torch.tensor([completion.truncated for completion in completions], dtype=torch.bool),
            late=torch.tensor([completion.late for completion in completions], dtype=torch.bool),
            **others,
        )

    def __len__(self) -> int:
        return len(self.prompts)

    @property
    def accuracy(self) -> Tensor:
        """``[B]`` the reward's "accuracy" part."""
        return self.reward_parts["accuracy"]

    @property
    def num_groups(self) -> int:
        """On all ranks."""
        if self.total_groups is not None:
            return self.total_groups
        return int(self.groups.max()) + 1 if len(self) else 0

    def to(self, device: torch.device | str) -> Self:
        return to_device(self, device)


@dataclass(frozen=True)
class ModelSpec:
    """What an engine must know to build an empty copy of the policy; the weights arrive with ``load_weights``."""

    config: Any
    """The transformers ``PretrainedConfig``."""
    eos_token_ids: tuple[int, ...]
    device: torch.device
    trust_remote_code: bool = False


class RolloutEngine(Protocol):
    """Generates from the weights it was last given. Speaks token ids only."""

    dtype: Dtype
    """Of its copy of the weights."""
    max_model_len: int | None
    """Longest prompt + response in tokens, known after :meth:`setup`; None: no limit."""

    def setup(self, spec: ModelSpec) -> None:
        """Build the model (once; later calls with the same spec do nothing)."""

    def load_weights(self, named_tensors: Iterable[tuple[str, Tensor]], *, partial: bool = False) -> None:
        """Replace all weights, or (``partial``) those of whole layers, the head or the embedding, and forget what was
        computed with the old ones. Raises if a weight is missing or unknown."""

    def generate(
        self, prompts: Sequence[Sequence[int]], sampling: SamplingParams, seeds: Sequence[Sequence[int]]
    ) -> list[list[Generation]]:
        """``len(seeds[i])`` samples of ``prompts[i]``, in order. Same weights, prompts and seeds → same samples."""

    def offload(self) -> None:
        """Free the accelerator's memory until :meth:`onload` (a no-op on CPU)."""

    def onload(self) -> None:
        """Take it back."""

    def close(self) -> None:
        """Release everything. The engine may be set up again."""


class PolicyProvider(Protocol):
    """What a datamodule needs of the LightningModule that it feeds. Any module with these can use our datamodules."""

    tokenizer: Any
    eos_token_ids: tuple[int, ...]
    min_group_size: int
    """How many responses to one prompt the algorithm needs: 2 for group-relative advantages, otherwise 1."""

    def model_spec(self) -> ModelSpec: ...

    def named_full_weights(self) -> Iterable[tuple[str, Tensor]]:
        """The policy's current weights under their Hugging Face names, gathered if sharded, one at a time."""

    @property
    def compute_dtype(self) -> Dtype:
        """What the policy computes in."""

    def response_logp(self, sequences: Sequences, temperature: float) -> Tensor:
        """``[B, T]`` log-probs of the response tokens under the current policy, without gradients."""
