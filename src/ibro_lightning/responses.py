"""Prompts, responses and their rewards, without tensors: what engines and rewards speak of.

Apart from :mod:`.types`, which adds the tensors and re-exports all of this, so that the worker processes of rewards
need not load torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from ibro_lightning.errors import ConfigError

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
    question: str = ""
    """The bare question, where ``prompt`` wraps it in instructions: what is compared to find problems that are both
    trained and evaluated on. Empty: the prompt is the question."""
    part: str = ""
    """Which part of a mixture it comes from."""


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
    question: str = ""
    part: str = ""


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
    answer: str | None = None
    """What the verifier read as the response's answer, in a form in which equal answers are equal strings; "" if it
    found none, None if it does not say. For majority votes and the rate of answers that can be read."""
    timed_out: bool = False
    """The verifier was stopped, at its deadline or its memory limit: the reward is a configured one."""


@dataclass(frozen=True)
class Group:
    """The responses to one prompt, as the algorithms compare them."""

    prompt: Prompt
    completions: tuple[Completion, ...]
    results: tuple[RewardResult, ...]
