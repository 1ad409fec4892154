"""The seam for rewards: ``(prompt, completions) → one RewardResult each``, with named parts."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any

from ibro_lightning.errors import ConfigError, RewardError
from ibro_lightning.types import Completion, Prompt, RewardResult


class Reward(ABC):
    """Judges the completions of one prompt. Subclass :class:`VerifiableReward` if answers are right or wrong."""

    def setup(self, tokenizer: Any) -> None:  # noqa: B027  optional
        """Called once before the first response, with the policy's tokenizer, for rewards that read tokens."""

    @abstractmethod
    def __call__(self, prompt: Prompt, completions: Sequence[Completion]) -> list[RewardResult]:
        """One result per completion, in order."""


class VerifiableReward(Reward):
    """Right answers earn ``correct``, wrong ones ``incorrect``; a user's verifier is one method::

        class EndsWithAnswer(VerifiableReward):
            def verify(self, prompt, completion):
                return completion.text.endswith(str(prompt.answer))

    Args:
        correct, incorrect: the rewards at accuracy 1 and 0; fractions of an accuracy lie between them.
    """

    def __init__(self, correct: float = 1.0, incorrect: float = -1.0) -> None:
        if not correct > incorrect:
            raise ConfigError("reward.init_args.correct", correct, f"write a number above incorrect ({incorrect})")
        self.correct, self.incorrect = correct, incorrect

    @abstractmethod
    def verify(self, prompt: Prompt, completion: Completion) -> bool | float:
        """True or 1 for right, False or 0 for wrong."""

    def __call__(self, prompt: Prompt, completions: Sequence[Completion]) -> list[RewardResult]:
        accuracies = [float(self.verify(prompt, completion)) for completion in completions]
        return [
            RewardResult(self.incorrect + (self.correct - self.incorrect) * accuracy, {"accuracy": accuracy})
            for accuracy in accuracies
        ]


class RewardSum(Reward):
    """Several rewards added up; their parts are kept side by side.

    Args:
        rewards: each contributes its reward and its parts. Exactly one of them must give the part "accuracy".
        weights: factors of the rewards in the sum (not of the parts); all 1 if left out.
    """

    def __init__(self, rewards: list[Reward], weights: list[float] | None = None) -> None:
        if not rewards:
            raise ConfigError("reward.init_args.rewards", rewards, "name at least one reward")
        if weights is not None and len(weights) != len(rewards):
            raise ConfigError("reward.init_args.weights", weights, f"write {len(rewards)} numbers, one per reward")
        self.rewards = rewards
        self.weights = weights if weights is not None else [1.0] * len(rewards)

    def setup(self, tokenizer: Any) -> None:
        for reward in self.rewards:
            reward.setup(tokenizer)

    def __call__(self, prompt: Prompt, completions: Sequence[Completion]) -> list[RewardResult]:
        columns = [score(reward, prompt, completions) for reward in self.rewards]
        return [self._add(results) for results in zip(*columns, strict=True)]

    def _add(self, results: Sequence[RewardResult]) -> RewardResult:
        parts: dict[str, float] = {}
        for result in results:
            if twice := parts.keys() & result.parts.keys():
                raise RewardError(f"data.reward: two rewards both name a part {sorted(twice)}: rename one of them")
            parts |= result.parts
        total = sum(weight * result.reward for weight, result in zip(self.weights, results, strict=True))
        return RewardResult(total, parts)


def score(reward: Reward, prompt: Prompt, completions: Sequence[Completion]) -> list[RewardResult]:
    """Call ``reward`` and check what it says, so that no NaN and no silent mismatch reaches training.

    Raises:
        RewardError: the reward raised, returned another number of results, or something that is not finite.
    """
    name = type(reward).__name__
    try:
        results = reward(prompt, completions)
    except (RewardError, ConfigError):
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
