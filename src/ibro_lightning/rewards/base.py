"""The seam for rewards: ``(prompt, completions) → one RewardResult each``, with named parts."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any, TypeAlias

from ibro_lightning.errors import ConfigError, RewardError
from ibro_lightning.responses import Completion, Prompt, RewardResult

Answered: TypeAlias = tuple[Prompt, Sequence[Completion]]
"""A prompt with the responses to judge."""
Judge: TypeAlias = Callable[["Reward", Sequence[Answered]], list[list[RewardResult]]]
"""Has one reward judge many responses: in this process, or in the worker processes of a pool."""


class Reward(ABC):
    """Judges the completions of one prompt. Subclass :class:`VerifiableReward` if answers are right or wrong."""

    pooled: bool = True
    """Judge in the worker processes of ``data.reward_pool``, which stop what takes too long. False keeps the reward in
    the trainer's process: it is quick whatever a response says, or it holds something that cannot leave (a model)."""
    deadline_s: float | None = None
    """Seconds after which the pool stops it; None takes the pool's own deadline."""
    tells_bad_answers: bool = False
    """An empty response is judged in no time, and an answer of a prompt that cannot be used raises even then: every
    prompt is tried so before training, not when it is drawn hours later."""
    one_by_one: bool = False
    """Each response is judged without a look at the others: the deadline is then for one response."""

    def setup(self, tokenizer: Any) -> None:  # noqa: B027  optional
        """Called once before the first response, with the policy's tokenizer, for rewards that read tokens."""

    def preload(self) -> None:  # noqa: B027  optional
        """Called once in the process that the pool's workers are forked from: import here what is slow to import."""

    @abstractmethod
    def __call__(self, prompt: Prompt, completions: Sequence[Completion]) -> list[RewardResult]:
        """One result per completion, in order."""

    def leaves(self) -> Iterator[Reward]:
        """The rewards this one is made of; itself, if it is not made of others."""
        yield self

    def judge(self, answered: Sequence[Answered], judge: Judge) -> list[list[RewardResult]]:
        """All responses to many prompts. A reward made of others has ``judge`` call each of them, and combines."""
        return judge(self, answered)

    def stopped(self, score: float) -> RewardResult:
        """The result of a response whose verification had to be stopped, given the configured ``score``."""
        return RewardResult(score, {}, timed_out=True)


@dataclass(frozen=True)
class Verdict:
    """What a verifier says of one response: ``accuracy`` in [0, 1], and the answer it read (see
    :class:`~ibro_lightning.responses.RewardResult`)."""

    accuracy: float
    answer: str | None = None


class VerifiableReward(Reward):
    """Right answers earn ``correct``, wrong ones ``incorrect``; a user's verifier is one method::

        class EndsWithAnswer(VerifiableReward):
            def verify(self, prompt, completion):
                return completion.text.endswith(str(prompt.answer))

    Args:
        correct, incorrect: the rewards at accuracy 1 and 0; fractions of an accuracy lie between them.
    """

    one_by_one = True

    def __init__(self, correct: float = 1.0, incorrect: float = -1.0) -> None:
        if not correct > incorrect:
            raise ConfigError("reward.init_args.correct", correct, f"write a number above incorrect ({incorrect})")
        self.correct, self.incorrect = correct, incorrect

    @abstractmethod
    def verify(self, prompt: Prompt, completion: Completion) -> bool | float | Verdict:
        """True or 1 for right, False or 0 for wrong; or a :class:`Verdict`, which names the answer, too."""

    def __call__(self, prompt: Prompt, completions: Sequence[Completion]) -> list[RewardResult]:
        return [self._result(self.verify(prompt, completion)) for completion in completions]

    def _result(self, said: bool | float | Verdict, timed_out: bool = False) -> RewardResult:
        verdict = said if isinstance(said, Verdict) else Verdict(said)
        accuracy = float(verdict.accuracy)
        reward = self.incorrect + (self.correct - self.incorrect) * accuracy
        return RewardResult(reward, {"accuracy": accuracy}, verdict.answer, timed_out)

    def stopped(self, score: float) -> RewardResult:
        """``score`` is an accuracy here."""
        return self._result(Verdict(score, ""), timed_out=True)


def score(reward: Reward, prompt: Prompt, completions: Sequence[Completion]) -> list[RewardResult]:
    """Call ``reward`` and check what it says, so that no NaN and no silent mismatch reaches training.

    Raises:
        RewardError: the reward raised, returned another number of results, or something that is not finite.
    """
    name = type(reward).__name__
    try:
        results = reward(prompt, completions)
    except (RewardError, ConfigError, MemoryError):  # the last is the pool's to handle
        raise
    except Exception as error:
        raise RewardError(
            f"data.reward: {name} raised {type(error).__name__}: {error} (prompt {prompt.id!r}) - "
            "a reward must return a finite number for every response, wrong and empty ones included"
        ) from error
    if not isinstance(results, list | tuple) or not all(_is_result(result) for result in results):
        raise RewardError(
            f"data.reward: {name} returned {str(results)[:100]} for prompt {prompt.id!r} - return a list with one "
            "RewardResult(reward, parts) per completion, numbers in both; or subclass VerifiableReward, whose verify "
            "returns a plain number"
        )
    if len(results) != len(completions):
        raise RewardError(
            f"data.reward: {name} returned {len(results)} results for {len(completions)} completions "
            f"of prompt {prompt.id!r}"
        )
    for result in results:
        values = {"reward": result.reward, **result.parts}
        if bad := {key: value for key, value in values.items() if not math.isfinite(value)}:
            raise RewardError(
                f"data.reward: {name} returned {bad} for prompt {prompt.id!r} - "
                "return finite numbers, 0 for 'cannot tell'"
            )
        if not 0 <= result.parts.get("accuracy", 0.0) <= 1:
            raise RewardError(
                f"data.reward: {name} returned the accuracy {result.parts['accuracy']} for prompt {prompt.id!r} - "
                "an accuracy lies between 0 (wrong) and 1 (right); rewards such as -1 belong into correct and incorrect"
            )
    return list(results)


def _is_result(value: object) -> bool:
    if not isinstance(value, RewardResult) or not isinstance(value.parts, Mapping):
        return False
    return all(isinstance(number, Real) for number in (value.reward, *value.parts.values()))
