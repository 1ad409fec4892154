"""Data that the parts of the framework exchange, without tensors: the worker processes of rewards need no torch.

In the order of one iteration: ``Problem`` (a source's text) → ``Prompt`` (its tokens) → ``Generation`` (the engine's
tokens) → ``Completion`` (with text) → ``RewardResult`` → ``Rollout`` (one Lightning batch) → ``Experience`` (what one
update needs); the last two are in :mod:`ibro_lightning.batches`. Shapes: ``B`` responses, ``N`` tokens of them, row
after row without padding; in a padded micro-batch, ``L`` prompt + response tokens and ``T`` response tokens.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import Any, ClassVar, Literal, Self, get_args

from ibro_lightning.errors import ConfigError

Message = Mapping[str, Any]
"""``{role, content}``; further keys are for the chat template."""
FinishReason = Literal["stop", "length", "deadline"]
"""EOS, the length limit, or the engine's deadline."""
Dtype = Literal["float32", "bfloat16", "float16"]


ControlText = Literal["warn", "refuse", "as_text"]
"""How text in the data that spells a control token of the tokenizer, such as ``<|im_end|>``, is treated."""

MIN_TEMPERATURE = 1e-6
"""The lowest temperature above 0: dividing logits by much less overflows float32."""


def check_choice(field: str, value: object, choices: Any) -> None:
    """Raise :class:`ConfigError` unless ``value`` is one of a ``Literal``."""
    if value not in get_args(choices):
        raise ConfigError(field, value, f"write {' or '.join(map(str, get_args(choices)))}")


@dataclass(frozen=True)
class SamplingParams:
    """How responses are sampled.

    Args:
        temperature: divides the logits; 0 is greedy decoding (evaluation only). vLLM takes 0 and 0.01 up to 2.
        top_p: keep the most likely tokens whose probabilities sum to this; 1 keeps all.
        top_k: keep this many most likely tokens; 0 keeps all.
        min_p: drop tokens less likely than this share of the most likely one; 0 keeps all.
        max_tokens: response length limit in tokens, EOS included.
        stop_token_ids: tokens besides the model's EOS that end a response, and are its last.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    max_tokens: int = 256
    stop_token_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        numbers = {"temperature": Real, "top_p": Real, "min_p": Real, "top_k": Integral, "max_tokens": Integral}
        for name, kind in numbers.items():
            if not isinstance(value := getattr(self, name), kind) or isinstance(value, bool):
                raise ConfigError(name, value, f"write a {'whole ' if kind is Integral else ''}number")
        if not (self.temperature == 0 or MIN_TEMPERATURE <= self.temperature < math.inf):
            remedy = f"write 0 (greedy) or a finite number of at least {MIN_TEMPERATURE:g}"
            raise ConfigError("temperature", self.temperature, remedy)
        if not 0 < self.top_p <= 1:
            raise ConfigError("top_p", self.top_p, "write a number above 0 and up to 1 (1 keeps all tokens)")
        if self.top_k < 0:
            raise ConfigError("top_k", self.top_k, "write 0 (all tokens) or a positive number")
        if not 0 <= self.min_p < 1:
            raise ConfigError("min_p", self.min_p, "write 0 (all tokens) or a number below 1")
        if self.max_tokens < 1:
            raise ConfigError("max_tokens", self.max_tokens, "write 1 or more")
        if any(token < 0 for token in self.stop_token_ids):
            raise ConfigError("stop_token_ids", list(self.stop_token_ids), "write token ids, from 0")

    @property
    def truncates_distribution(self) -> bool:
        """Whether some tokens cannot be sampled, which makes every importance ratio in training wrong."""
        return self.top_p < 1 or self.top_k > 0 or self.min_p > 0


@dataclass(frozen=True)
class Problem:
    """A question as its source states it, before tokenization.

    ``prompt`` is raw text, or a list of ``{role, content}`` messages for the model's chat template; if the last message
    is the assistant's, the response continues it. ``answer`` is what the reward needs to judge a response. ``id`` is
    unique within the source and stable: seeds derive from it. ``meta`` is stored with the responses in the rollout log.
    """

    id: str
    prompt: str | Sequence[Message]
    answer: Any
    meta: Mapping[str, Any] = field(default_factory=dict)
    question: str = ""
    """The question without instructions, to find problems that are trained and evaluated on; empty: the prompt."""
    part: str = ""
    """The part of a mixture that it comes from."""
    own_text: tuple[str, ...] = ()
    """Text around the data that a recipe's template adds: control tokens there are intended (``data.control_text``)."""


@dataclass(frozen=True)
class Prompt:
    """A :class:`Problem` ready for an engine: ``text`` is exactly what ``token_ids`` decode to.

    ``content`` is the problem's own prompt before the chat template, from which hindsight prompts are built.
    """

    id: str
    text: str
    token_ids: tuple[int, ...]
    answer: Any
    meta: Mapping[str, Any] = field(default_factory=dict)
    content: str | Sequence[Message] = ""
    question: str = ""
    part: str = ""
    prefill: str = ""
    """The assistant's words at the end of the prompt. Rewards read them as the beginning of the response."""
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    """Arguments of the chat template besides the messages."""
    own_text: tuple[str, ...] = ()
    """See :class:`Problem`."""
    control_text: ControlText = "warn"
    """How control tokens in the data's text are treated."""


class Numbers(Sequence[Any]):
    """Reads like a tuple of Python's numbers, and is equal to one, but takes 4 bytes for each of them. Without numpy,
    which the worker processes of rewards do not import; ``numpy.asarray`` copies nothing.

    Args:
        values: any sequence or array; copied, unless it is of this class.
    """

    __slots__ = ("_view",)
    typecode: ClassVar[Literal["i", "f"]]

    def __init__(self, values: Any = ()) -> None:
        if isinstance(values, type(self)):
            self._view: memoryview = values._view
        else:
            numbers = values.tolist() if hasattr(values, "tolist") else [*values]
            self._view = memoryview(array(self.typecode, numbers)).toreadonly()

    @classmethod
    def shared(cls, buffer: Any) -> Self:
        """Of an array of this type, which its owner no longer changes, without a copy."""
        view = memoryview(buffer).toreadonly()
        if view.format != cls.typecode or view.ndim != 1:
            raise TypeError(f"an array of type {cls.typecode} with one dimension, not {view.format} with {view.ndim}")
        numbers = cls()
        numbers._view = view
        return numbers

    def __len__(self) -> int:
        return len(self._view)

    def __iter__(self) -> Iterator[Any]:
        return iter(self._view.tolist())

    def __getitem__(self, place: Any) -> Any:
        return self.shared(self._view[place]) if isinstance(place, slice) else self._view[place]

    def __eq__(self, other: object) -> bool:
        if isinstance(other, type(self)):
            return self._view == other._view or self._view.tobytes() == other._view.tobytes()  # nan, too
        return tuple(self) == other if isinstance(other, tuple) else NotImplemented

    def __hash__(self) -> int:
        return hash(tuple(self))

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Any:
        import numpy as np  # which is there, since it asks

        return np.array(self._view, dtype=dtype) if copy else np.asarray(self._view, dtype=dtype)

    def __reduce__(self) -> tuple[Any, ...]:
        return _unpickled, (type(self), array(self.typecode, self._view.tobytes()))

    def __repr__(self) -> str:
        return repr(tuple(self)) if len(self) <= 16 else f"({str(tuple(self[:8]))[1:-1]}, … {len(self)} numbers)"


def _unpickled(kind: type[Numbers], numbers: Any) -> Numbers:
    return kind.shared(numbers)


class TokenIds(Numbers):
    """Token ids as int32."""

    __slots__ = ()
    typecode = "i"


class Logp(Numbers):
    """Log-probs as float32; nan in place of None."""

    __slots__ = ()
    typecode = "f"

    def __init__(self, values: Any = ()) -> None:
        has_none = isinstance(values, list | tuple) and None in values
        super().__init__([math.nan if value is None else value for value in values] if has_none else values)


@dataclass(frozen=True)
class Generation:
    """What an engine returns for one sample: token ids, EOS included if it was produced, and their log-probs. Any
    sequence may be given for them; they are kept as :class:`TokenIds` and :class:`Logp`.

    ``logp`` are nats under the distribution actually sampled (temperature and truncation included): one per token, or
    empty if they are not available. A token whose log-prob is nan or −inf is not trained on.
    """

    token_ids: Sequence[int]
    logp: Sequence[float]
    finish_reason: FinishReason

    def __post_init__(self) -> None:
        _keep_compact(self)


@dataclass(frozen=True)
class Completion:
    """A generation with its text, as rewards see it. ``max_tokens`` is the limit under which it was sampled.

    ``text`` is the decoded tokens; rewards receive it after the prompt's ``prefill``. Tokens and log-probs are the
    generation's own.
    """

    token_ids: Sequence[int]
    logp: Sequence[float]
    finish_reason: FinishReason
    text: str
    max_tokens: int
    seed: int

    def __post_init__(self) -> None:
        _keep_compact(self)

    @property
    def truncated(self) -> bool:
        return self.finish_reason == "length"

    @property
    def late(self) -> bool:
        return self.finish_reason == "deadline"


@dataclass(frozen=True)
class RewardResult:
    """``reward`` is trained on; ``parts["accuracy"]`` in [0, 1] is reported, and dynamic sampling filters on it."""

    reward: float
    parts: Mapping[str, float]
    answer: str | None = None
    """The response's answer as the verifier reads it, normalized so that equal answers are equal strings; "" if it
    finds none, None if it does not report one. For majority votes and the rate of readable answers."""
    timed_out: bool = False
    """The verifier was stopped at its deadline or memory limit: the reward is a configured value."""
    outcome_span: float | None = field(default=None, compare=False)  # a property of the reward, not of the response
    """How much more an accuracy of 1 earns than 0; None counts as 1. For groups of equal accuracy (docs/rewards.md)."""
    why: str | None = None
    """In a word how the verdict was reached, as "exact" or "another unit"; None if the verifier does not say."""


@dataclass(frozen=True)
class Group:
    """The responses to one prompt, which the algorithms compare."""

    prompt: Prompt
    completions: tuple[Completion, ...]
    results: tuple[RewardResult, ...]


def _keep_compact(sampled: Generation | Completion) -> None:
    logp: Sequence[float] | None = sampled.logp  # an engine without log-probs may say None
    for name, values in (("token_ids", TokenIds(sampled.token_ids)), ("logp", Logp(() if logp is None else logp))):
        object.__setattr__(sampled, name, values)  # in place of the sequences given; the fields are frozen
