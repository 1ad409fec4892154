"""What the parts of the framework hand to each other. Modules and datamodules meet here and nowhere else.

As the data walks one iteration: ``Problem`` (a source's text) → ``Prompt`` (its tokens) → ``Generation`` (the engine's
tokens) → ``Completion`` (with text) → ``RewardResult`` → ``Rollout`` (one Lightning batch) → ``Experience`` (what one
update needs, in :mod:`.experience`). Shapes: ``B`` responses, ``L`` prompt + response tokens, ``T`` response tokens,
padded.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, Self

import torch
from torch import Tensor

from ibro_lightning.errors import ConfigError
from ibro_lightning.sequences import Sequences, to_device

Message = Mapping[str, str]
FinishReason = Literal["stop", "length", "deadline"]
"""EOS; the length limit; the engine's deadline, which came first."""
Dtype = Literal["float32", "bfloat16", "float16"]


@dataclass(frozen=True)
class SamplingParams:
    """How responses are sampled.

    Args:
        temperature: divides the logits; 0 is greedy decoding (evaluation only).
        top_p: keep the most likely tokens whose probabilities sum to this; 1 keeps all.
        top_k: keep this many most likely tokens; 0 keeps all.
        min_p: drop tokens less likely than this share of the most likely one; 0 keeps all.
        max_tokens: response length limit in tokens, EOS included.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    max_tokens: int = 256

    def __post_init__(self) -> None:
        if self.temperature < 0:
            raise ConfigError("sampling.temperature", self.temperature, "write 0 (greedy) or a positive number")
        if not 0 < self.top_p <= 1:
            raise ConfigError("sampling.top_p", self.top_p, "write a number above 0 and up to 1 (1 keeps all tokens)")
        if self.top_k < 0:
            raise ConfigError("sampling.top_k", self.top_k, "write 0 (all tokens) or a positive number")
        if not 0 <= self.min_p < 1:
            raise ConfigError("sampling.min_p", self.min_p, "write 0 (all tokens) or a number below 1")
        if self.max_tokens < 1:
            raise ConfigError("sampling.max_tokens", self.max_tokens, "write 1 or more")

    @property
    def truncates_distribution(self) -> bool:
        """True if some tokens cannot be sampled, which makes every importance ratio of training wrong."""
        return self.top_p < 1 or self.top_k > 0 or self.min_p > 0


@dataclass(frozen=True)
class Problem:
    """A question as its source states it, before any tokenizer.

    ``prompt`` is raw text, or a list of ``{role, content}`` messages for the model's chat template. ``answer`` is what
    the reward needs to judge a response. ``id`` is unique within the source and stable: seeds derive from it. ``meta``
    is kept beside the responses in the rollout log.
    """

    id: str
    prompt: str | Sequence[Message]
    answer: Any
    meta: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Prompt:
    """A :class:`Problem` ready for an engine: ``text`` is exactly what ``token_ids`` decode to.

    ``content`` is the problem's own prompt, before the chat template: what a hindsight prompt is built from.
    """

    id: str
    text: str
    token_ids: tuple[int, ...]
    answer: Any
    meta: Mapping[str, Any] = field(default_factory=dict)
    content: str | Sequence[Message] = ""


@dataclass(frozen=True)
class Generation:
    """What an engine returns for one sample: token ids, EOS included if it was produced, and their log-probs.

    ``logp`` are nats under the distribution actually sampled (temperature and truncation included).
    """

    token_ids: tuple[int, ...]
    logp: tuple[float, ...]
    finish_reason: FinishReason


@dataclass(frozen=True)
class Completion:
    """A generation with its text, as rewards see it. ``max_tokens`` is the limit under which it was sampled."""

    token_ids: tuple[int, ...]
    logp: tuple[float, ...]
    finish_reason: FinishReason
    text: str
    max_tokens: int
    seed: int

    @property
    def truncated(self) -> bool:
        return self.finish_reason == "length"

    @property
    def late(self) -> bool:
        return self.finish_reason == "deadline"


@dataclass(frozen=True)
class RewardResult:
    """A response's reward, and the named parts it is made of. ``parts["accuracy"]`` in [0, 1] is what is reported,
    and what dynamic sampling filters on; ``reward`` is what is trained on."""

    reward: float
    parts: Mapping[str, float]


@dataclass(frozen=True)
class Group:
    """The responses to one prompt, as the algorithms compare them."""

    prompt: Prompt
    completions: tuple[Completion, ...]
    results: tuple[RewardResult, ...]


@dataclass(frozen=True)
class Rollout:
    """One Lightning batch: responses sampled from the current policy, with their rewards.

    Tensors are ``[B]`` unless said otherwise; ``prompts`` and ``completions`` are the same rows for people and
    callbacks. ``groups`` numbers the prompt that each response answers, 0..G-1. ``metrics`` says how generation went.
    """

    prompts: tuple[Prompt, ...]
    completions: tuple[Completion, ...]
    sequences: Sequences
    sampler_logp: Tensor
    """``[B, T]`` log-probs the engine sampled with; 0 on padding."""
    rewards: Tensor
    reward_parts: Mapping[str, Tensor]
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

    @classmethod
    def from_groups(cls, groups: Sequence[Group], **others: Any) -> Self:
        """Build from whole groups; ``others`` are the remaining fields (name, iteration, temperature, …)."""
        rows = [
            (i, g.prompt, c, r) for i, g in enumerate(groups) for c, r in zip(g.completions, g.results, strict=True)
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
