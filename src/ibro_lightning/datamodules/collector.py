"""Prompts → engine → rewards: the same few lines for training and for evaluation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ibro_lightning.errors import RewardError
from ibro_lightning.rewards import Judge, Reward, judge_here
from ibro_lightning.timing import PhaseTimer
from ibro_lightning.types import Completion, Generation, Group, Prompt, RewardResult, RolloutEngine, SamplingParams


class Collector:
    """Samples responses and has them judged.

    Args:
        engine: set up and holding the weights to sample from.
        tokenizer: turns a response's tokens into the text that rewards read, special tokens left out.
        judge: has a reward judge responses, here or in the reward pool.
    """

    def __init__(self, engine: RolloutEngine, tokenizer: Any, judge: Judge = judge_here) -> None:
        self.engine, self.tokenizer, self.judge = engine, tokenizer, judge

    def collect(
        self,
        prompts: Sequence[Prompt],
        seeds: Sequence[Sequence[int]],
        sampling: SamplingParams,
        reward: Reward,
        timer: PhaseTimer,
    ) -> list[Group]:
        """One group per prompt, with ``len(seeds[i])`` responses each."""
        with timer("generate"):
            generations = self.engine.generate([p.token_ids for p in prompts], sampling, seeds)
        with timer("reward"):
            answered = [
                (prompt, self._completions(samples, sample_seeds, sampling))
                for prompt, samples, sample_seeds in zip(prompts, generations, seeds, strict=True)
            ]
            judged = reward.judge(answered, self.judge)
        return [
            Group(prompt, completions, tuple(results))
            for (prompt, completions), results in zip(answered, judged, strict=True)
        ]

    def _completions(
        self, samples: Sequence[Generation], seeds: Sequence[int], sampling: SamplingParams
    ) -> tuple[Completion, ...]:
        texts = self.tokenizer.batch_decode([list(sample.token_ids) for sample in samples], skip_special_tokens=True)
        return tuple(
            Completion(sample.token_ids, sample.logp, sample.finish_reason, text, sampling.max_tokens, seed)
            for sample, text, seed in zip(samples, texts, seeds, strict=True)
        )


def check_reward(
    reward: Reward, prompts: Sequence[Prompt], sampling: SamplingParams, judge: Judge = judge_here
) -> None:
    """Judge an empty response before anything expensive starts, so that a broken reward is found in the first seconds:
    to the first prompt of each part of a mixture, and to every prompt if the rewards say that this is cheap.

    Raises:
        RewardError: it raised, returned NaN, or does not say how accurate a response is; or an answer is unusable.
    """
    if not all(leaf.tells_bad_answers for leaf in reward.leaves()):
        prompts = list({prompt.part: prompt for prompt in reversed(prompts)}.values())
    empty = Completion((), (), "length", "", sampling.max_tokens, seed=0)
    results: list[RewardResult] = [row[0] for row in reward.judge([(prompt, [empty]) for prompt in prompts], judge)]
    if any("accuracy" not in result.parts for result in results):
        result = results[0]
        raise RewardError(
            f"data.reward: {type(reward).__name__} names the parts {sorted(result.parts)} but no 'accuracy', "
            "which is what is reported and filtered on: add parts={'accuracy': 0 or 1, ...} to its RewardResult"
        )
