"""Prompts → engine → rewards: the same few lines for training and for evaluation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ibro_lightning.errors import RewardError
from ibro_lightning.rewards import Reward, score
from ibro_lightning.timing import PhaseTimer
from ibro_lightning.types import Completion, Generation, Group, Prompt, RewardResult, RolloutEngine, SamplingParams


class Collector:
    """Samples responses and has them judged.

    Args:
        engine: set up and holding the weights to sample from.
        tokenizer: turns a response's tokens into the text that rewards read, special tokens left out.
    """

    def __init__(self, engine: RolloutEngine, tokenizer: Any) -> None:
        self.engine, self.tokenizer = engine, tokenizer

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
            return [
                self._group(prompt, samples, sample_seeds, sampling, reward)
                for prompt, samples, sample_seeds in zip(prompts, generations, seeds, strict=True)
            ]

    def _group(
        self,
        prompt: Prompt,
        samples: Sequence[Generation],
        seeds: Sequence[int],
        sampling: SamplingParams,
        reward: Reward,
    ) -> Group:
        texts = self.tokenizer.batch_decode([list(sample.token_ids) for sample in samples], skip_special_tokens=True)
        completions = tuple(
            Completion(sample.token_ids, sample.logp, sample.finish_reason, text, sampling.max_tokens, seed)
            for sample, text, seed in zip(samples, texts, seeds, strict=True)
        )
        return Group(prompt, completions, tuple(score(reward, prompt, completions)))


def check_reward(reward: Reward, prompt: Prompt, sampling: SamplingParams) -> None:
    """Judge an empty response before anything expensive starts, so that a broken reward is found in the first second.

    Raises:
        RewardError: it raised, returned NaN, or does not say how accurate a response is.
    """
    empty = Completion((), (), "length", "", sampling.max_tokens, seed=0)
    result: RewardResult = score(reward, prompt, [empty])[0]
    if "accuracy" not in result.parts:
        raise RewardError(
            f"data.reward: {type(reward).__name__} names the parts {sorted(result.parts)} but no 'accuracy', "
            "which is what is reported and filtered on: add parts={'accuracy': 0 or 1, ...} to its RewardResult"
        )
