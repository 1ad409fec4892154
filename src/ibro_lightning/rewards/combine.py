"""Rewards made of rewards: a weighted sum, and one reward per part of a mixture."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ibro_lightning.errors import ConfigError, RewardError
from ibro_lightning.responses import Completion, Prompt, RewardResult
from ibro_lightning.rewards.base import Answered, Judge, Reward, score


class CombinedReward(Reward):
    """A reward made of others. Subclasses say in :meth:`judge` who judges what."""

    pooled = False  # it only adds up; each of its rewards says for itself where it runs

    def __init__(self, rewards: Sequence[Reward]) -> None:
        self.rewards = list(rewards)

    def leaves(self) -> Iterator[Reward]:
        for reward in self.rewards:
            yield from reward.leaves()

    def setup(self, tokenizer: Any) -> None:
        for reward in self.rewards:
            reward.setup(tokenizer)

    def __call__(self, prompt: Prompt, completions: Sequence[Completion]) -> list[RewardResult]:
        return self.judge([(prompt, completions)], judge_here)[0]


class RewardSum(CombinedReward):
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
        super().__init__(rewards)
        self.weights = weights if weights is not None else [1.0] * len(rewards)

    def judge(self, answered: Sequence[Answered], judge: Judge) -> list[list[RewardResult]]:
        columns = [reward.judge(answered, judge) for reward in self.rewards]
        return [
            [self._add(results) for results in zip(*of_one_prompt, strict=True)]
            for of_one_prompt in zip(*columns, strict=True)
        ]

    def _add(self, results: Sequence[RewardResult]) -> RewardResult:
        parts: dict[str, float] = {}
        for result in results:
            if twice := parts.keys() & result.parts.keys():
                raise RewardError(f"data.reward: two rewards both name a part {sorted(twice)}: rename one of them")
            parts |= result.parts
        total = sum(weight * result.reward for weight, result in zip(self.weights, results, strict=True))
        answer = next((result.answer for result in results if result.answer is not None), None)
        return RewardResult(total, parts, answer, any(result.timed_out for result in results))


class RewardByPart(CombinedReward):
    """Each part of a :class:`~ibro_lightning.datamodules.MixtureSource` has a reward of its own.

    Args:
        rewards: by the part's name.
    """

    def __init__(self, rewards: dict[str, Reward]) -> None:
        if not rewards:
            raise ConfigError("reward.init_args.rewards", "{}", "name a reward for each part of the mixture")
        super().__init__(list(rewards.values()))
        self.by_part: Mapping[str, Reward] = dict(rewards)

    def judge(self, answered: Sequence[Answered], judge: Judge) -> list[list[RewardResult]]:
        for prompt, _ in answered:
            if prompt.part not in self.by_part:
                raise ConfigError(
                    "reward.init_args.rewards",
                    sorted(self.by_part),
                    f"add a reward for the part {prompt.part!r} of the mixture (prompt {prompt.id!r})",
                )
        results: list[list[RewardResult]] = [[] for _ in answered]
        for part, reward in self.by_part.items():
            rows = [row for row, (prompt, _) in enumerate(answered) if prompt.part == part]
            for row, judged in zip(rows, reward.judge([answered[row] for row in rows], judge), strict=True):
                results[row] = judged
        return results


def judge_here(reward: Reward, answered: Sequence[Answered]) -> list[list[RewardResult]]:
    """Judge in this process, checking what the reward says (see :func:`score`)."""
    return [score(reward, prompt, completions) for prompt, completions in answered]
