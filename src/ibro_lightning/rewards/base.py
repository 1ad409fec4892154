"""The interface of rewards: ``(prompt, completions) → one RewardResult each``, with named parts.

A reward may be made of others. A judge runs the leaves, and :meth:`Reward.combine` puts their results together.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any, NamedTuple, TypeAlias

from ibro_lightning.errors import ConfigError, RewardError, check_instance, is_number
from ibro_lightning.rewards.blame import blamed_on
from ibro_lightning.types import Completion, Prompt, RewardResult

Answered: TypeAlias = tuple[Prompt, Sequence[Completion]]
"""A prompt with the responses to judge."""


@dataclass(frozen=True)
class PlainResponses:
    """Responses that consist of an answer, in the form that a verifier looks for.

    Args:
        right: each must be accepted; for a gold with alternatives, one of each.
        wrong: other values of the same kind; none may be accepted.
    """

    right: tuple[str, ...]
    wrong: tuple[str, ...] = ()


class Request(NamedTuple):
    """A task of a judge: one leaf reward on the responses to one prompt."""

    reward: Reward
    prompt: Prompt
    completions: Sequence[Completion]


Judge: TypeAlias = Callable[[Sequence[Request]], list[list[RewardResult]]]
"""Runs leaf rewards, in this process or in the worker processes of a pool: for each request one result per response."""


class Reward(ABC):
    """Judges the completions of one prompt. Subclass :class:`VerifiableReward` if answers are right or wrong."""

    pooled: bool = True
    """Judge in the pool's worker processes. False: it is always fast, or holds what cannot be sent (a model)."""
    deadline_s: float | None = None
    """Seconds after which the pool stops it; None takes the pool's deadline."""
    tells_bad_answers: bool = False
    """Judging an empty response is fast, and raises if the prompt's answer is unusable: tried before training."""
    one_by_one: bool = False
    """Each response is judged independently of the others: the deadline then applies to one response."""

    def setup(self, tokenizer: Any) -> None:  # noqa: B027  optional
        """Called once before the first response, with the policy's tokenizer, for rewards that read tokens."""

    def preload(self) -> None:  # noqa: B027  optional
        """Called once in the process that forks the pool's workers: import here what is slow to import."""

    @abstractmethod
    def __call__(self, prompt: Prompt, completions: Sequence[Completion]) -> list[RewardResult]:
        """One result per completion, in order."""

    def leaves(self) -> Iterator[Reward]:
        """The rewards that this one is made of; itself if there are none."""
        yield self

    def leaves_for(self, prompt: Prompt) -> Iterator[Reward]:
        """The leaves that judge this prompt."""
        yield from self.leaves()

    def combine(self, prompt: Prompt, results: Iterator[list[RewardResult]]) -> list[RewardResult]:
        """One result per response: takes the next item of ``results`` for each leaf of :meth:`leaves_for`, in order."""
        return next(results)

    def plain_responses(self, prompt: Prompt) -> PlainResponses | None:
        """A right answer to this prompt as bare responses, and wrong ones of the same kind, on which its gold is tried
        before training; None tries nothing. Raises RewardError or ValueError if the gold is unusable."""
        return None

    def stopped(self, score: float) -> RewardResult:
        """The result of a response whose verification was stopped, given the configured ``score``."""
        return RewardResult(score, {}, timed_out=True)


@dataclass(frozen=True)
class Verdict:
    """``accuracy`` in [0, 1] of one response, the answer that the verifier read, and in a word how it was decided (see
    :class:`RewardResult`)."""

    accuracy: float
    answer: str | None = None
    why: str | None = None


def check_reward_object(field: str, value: object) -> None:
    """Raise :class:`ConfigError` unless ``value`` is a reward; a plain function is not."""
    check_instance(field, value, Reward, ": subclass VerifiableReward, and say in verify what is right")


class VerifiableReward(Reward):
    """Right answers earn ``correct``, wrong ones ``incorrect``; a user's verifier is one method::

        class EndsWithAnswer(VerifiableReward):
            def verify(self, prompt, completion):
                return completion.text.endswith(str(prompt.answer))

    Args:
        correct, incorrect: the rewards at accuracy 1 and 0; linear in between.
    """

    one_by_one = True

    def __init__(self, correct: float = 1.0, incorrect: float = -1.0) -> None:
        for name, value in (("correct", correct), ("incorrect", incorrect)):
            if not (is_number(value) and math.isfinite(value)):
                raise ConfigError(name, value, "write a finite number")
        if not correct > incorrect:
            raise ConfigError("correct", correct, f"write a number above incorrect ({incorrect})")
        self.correct, self.incorrect = correct, incorrect

    @abstractmethod
    def verify(self, prompt: Prompt, completion: Completion) -> bool | float | Verdict:
        """True or 1 for right, False or 0 for wrong; or a :class:`Verdict`, which also names the answer."""

    def __call__(self, prompt: Prompt, completions: Sequence[Completion]) -> list[RewardResult]:
        return [self._result(self.verify(prompt, completion)) for completion in completions]

    def _result(self, verdict: bool | float | Verdict, timed_out: bool = False) -> RewardResult:
        if not isinstance(verdict, Verdict):
            verdict = Verdict(verdict)
        accuracy, span = float(verdict.accuracy), self.correct - self.incorrect
        reward = self.incorrect + span * accuracy
        return RewardResult(reward, {"accuracy": accuracy}, verdict.answer, timed_out, span, verdict.why)

    def stopped(self, score: float) -> RewardResult:
        """``score`` is an accuracy here."""
        return self._result(Verdict(score, "", "stopped"), timed_out=True)


def score(reward: Reward, prompt: Prompt, completions: Sequence[Completion]) -> list[RewardResult]:
    """Call ``reward``; raises :class:`RewardError` unless it returns finite numbers, one per response."""
    advice = "a reward must return a finite number for every response, wrong and empty ones included"
    with blamed_on(reward, f"prompt {prompt.id!r}", advice):  # MemoryError is the pool's to handle
        results = reward(prompt, completions)
        _check_results(type(reward).__name__, prompt, completions, results)
        return list(results)


def _check_results(name: str, prompt: Prompt, completions: Sequence[Completion], results: object) -> None:
    def bad(what: object, remedy: str) -> RewardError:
        return RewardError(f"{name} returned {what} for prompt {prompt.id!r} - {remedy}")

    if not isinstance(results, list | tuple) or not all(_is_result(result) for result in results):
        remedy = "return a list with one RewardResult(reward, parts) per completion, numbers in both; or subclass "
        raise bad(str(results)[:100], f"{remedy}VerifiableReward, whose verify returns a plain number")
    if len(results) != len(completions):
        raise bad(f"{len(results)} results", f"return one for each of its {len(completions)} completions")
    for result in results:
        values = {"reward": result.reward, **result.parts, "outcome_span": result.outcome_span or 0.0}
        if infinite := {key: value for key, value in values.items() if not math.isfinite(value)}:
            raise bad(infinite, "return finite numbers, 0 for 'cannot tell'")
        if not 0 <= (accuracy := result.parts.get("accuracy", 0.0)) <= 1:
            remedy = "it lies between 0 (wrong) and 1 (right); rewards such as -1 go into correct and incorrect"
            raise bad(f"the accuracy {accuracy}", remedy)


def _is_result(value: object) -> bool:
    if not (isinstance(value, RewardResult) and isinstance(value.parts, Mapping)):
        return False
    span = 0.0 if value.outcome_span is None else value.outcome_span
    return all(isinstance(number, Real) for number in (value.reward, span, *value.parts.values()))
