"""Rewards made of rewards: judging their leaves, a weighted sum, and one reward per part of a mixture."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

from ibro_lightning.errors import ConfigError, RewardError, is_number
from ibro_lightning.rewards.base import Answered, Judge, Request, Reward, check_reward_object, score
from ibro_lightning.rewards.blame import blamed_on
from ibro_lightning.types import Completion, Prompt, RewardResult


def judge_all(reward: Reward, answered: Sequence[Answered], judge: Judge) -> list[list[RewardResult]]:
    """All results of a reward that may be made of others: ``judge`` gets all of its leaves at once."""
    with blamed_on(reward, "leaves_for"):
        leaves = [list(reward.leaves_for(prompt)) for prompt, _ in answered]
    requests = [Request(leaf, *pair) for pair, row in zip(answered, leaves, strict=True) for leaf in row]
    results = iter(judge(requests))
    with blamed_on(reward, "adding up"):
        return [
            reward.combine(prompt, iter(list(islice(results, len(row)))))
            for (prompt, _), row in zip(answered, leaves, strict=True)
        ]


def judge_here(requests: Sequence[Request]) -> list[list[RewardResult]]:
    """Judge in this process, and check the results (see :func:`score`)."""
    return [score(*request) for request in requests]


class CombinedReward(Reward):
    """A reward made of others, whose results ``combine`` of a subclass puts together."""

    pooled = False  # it only combines; each of its rewards has its own ``pooled``

    def __init__(self, rewards: Sequence[Reward]) -> None:
        for reward in rewards:
            check_reward_object("rewards", reward)
        self.rewards = list(rewards)

    def leaves(self) -> Iterator[Reward]:
        for reward in self.rewards:
            yield from reward.leaves()

    def leaves_for(self, prompt: Prompt) -> Iterator[Reward]:
        for reward in self.rewards:
            yield from reward.leaves_for(prompt)

    def setup(self, tokenizer: Any) -> None:
        for reward in self.rewards:
            with blamed_on(reward, "setup"):
                reward.setup(tokenizer)

    def __call__(self, prompt: Prompt, completions: Sequence[Completion]) -> list[RewardResult]:
        return judge_all(self, [(prompt, completions)], judge_here)[0]


class RewardSum(CombinedReward):
    """The weighted sum of several rewards, with the parts of all of them.

    Args:
        rewards: each contributes its reward and its parts. Exactly one of them must have the part "accuracy".
        weights: factors of the rewards in the sum (not of the parts); all 1 by default.
    """

    def __init__(self, rewards: list[Reward], weights: list[float] | None = None) -> None:
        if not isinstance(rewards, list | tuple) or not rewards:
            raise ConfigError("rewards", rewards, "write a list of at least one reward")
        numbers = isinstance(weights, list | tuple) and len(weights) == len(rewards) and all(map(is_number, weights))
        if weights is not None and not numbers:
            raise ConfigError("weights", weights, f"write {len(rewards)} numbers, one per reward")
        super().__init__(rewards)
        self.weights = weights if weights is not None else [1.0] * len(rewards)

    def combine(self, prompt: Prompt, results: Iterator[list[RewardResult]]) -> list[RewardResult]:
        columns = [reward.combine(prompt, results) for reward in self.rewards]
        return [self._add(row) for row in zip(*columns, strict=True)]

    def _add(self, results: Sequence[RewardResult]) -> RewardResult:
        parts: dict[str, float] = {}
        for result in results:
            if shared := parts.keys() & result.parts.keys():
                raise RewardError(f"two rewards of a RewardSum both name a part {sorted(shared)}: rename one of them")
            parts |= result.parts
        weighted = list(zip(self.weights, results, strict=True))
        total = sum(weight * result.reward for weight, result in weighted)
        judging = [(weight, result.outcome_span) for weight, result in weighted if "accuracy" in result.parts]
        spans = [abs(weight) * (1.0 if span is None else span) for weight, span in judging]
        answer = next((result.answer for result in results if result.answer is not None), None)
        timed_out = any(result.timed_out for result in results)
        why = next((result.why for result in results if result.why is not None), None)
        return RewardResult(total, parts, answer, timed_out, spans[0] if spans else None, why)


class RewardByPart(CombinedReward):
    """A reward for each part of a :class:`~ibro_lightning.sources.MixtureSource`.

    Args:
        rewards: by the part's name.
    """

    def __init__(self, rewards: dict[str, Reward]) -> None:
        if not isinstance(rewards, Mapping) or not rewards:
            raise ConfigError("rewards", rewards, "name a reward for each part of the mixture")
        super().__init__(list(rewards.values()))
        self.by_part: Mapping[str, Reward] = dict(rewards)

    def leaves_for(self, prompt: Prompt) -> Iterator[Reward]:
        if prompt.part not in self.by_part:
            remedy = f"add a reward for the part {prompt.part!r} of the mixture (prompt {prompt.id!r})"
            raise ConfigError("rewards", sorted(self.by_part), remedy)
        yield from self.by_part[prompt.part].leaves_for(prompt)

    def combine(self, prompt: Prompt, results: Iterator[list[RewardResult]]) -> list[RewardResult]:
        return self.by_part[prompt.part].combine(prompt, results)
