"""Prompts → engine → rewards, shared by training and evaluation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from lightning.pytorch.utilities import rank_zero_warn

from ibro_lightning.datamodules.gold_check import OnBadGold, usable_golds
from ibro_lightning.datamodules.lost_verdicts import check_verdicts
from ibro_lightning.engines import HFEngine
from ibro_lightning.engines.base import PolicyProvider, RolloutEngine
from ibro_lightning.engines.weight_check import WeightCheck, WeightVerifier
from ibro_lightning.errors import ConfigError, RewardError, check_instance
from ibro_lightning.ranks import ALONE, Ranks
from ibro_lightning.rewards import Judge, PoolOptions, Reward, RewardPool, judge_all, judge_here
from ibro_lightning.rewards.blame import blamed_on
from ibro_lightning.rewards.pool import Verdicts
from ibro_lightning.seeding import run_seed
from ibro_lightning.timing import PhaseTimer
from ibro_lightning.types import Completion, Generation, Group, Prompt, SamplingParams, check_choice


class Collector:
    """Samples responses from the policy's current weights and judges them; arguments: :class:`EvaluationDataModule`."""

    provider: PolicyProvider
    ranks: Ranks

    def __init__(
        self,
        engine: RolloutEngine | None = None,
        weight_check: WeightCheck | None = WeightCheck(),
        reward_pool: PoolOptions | None = PoolOptions(),
        keep_special_tokens: bool = False,
        on_bad_gold: OnBadGold = "refuse",
    ) -> None:
        if engine is not None and (isinstance(engine, type) or not hasattr(engine, "setup")):
            raise ConfigError("engine", engine, "write an engine, such as HFEngine(), or None for that")
        check_instance("weight_check", weight_check, WeightCheck, optional=True)
        check_instance("reward_pool", reward_pool, PoolOptions, optional=True)
        check_choice("on_bad_gold", on_bad_gold, OnBadGold)
        self.engine: RolloutEngine = engine or HFEngine()
        self.weight_check, self.reward_pool = weight_check, reward_pool
        self.keep_special_tokens, self.on_bad_gold = keep_special_tokens, on_bad_gold
        self.pool: RewardPool | None = None
        self.judge: Judge = judge_here
        """Runs a reward on responses, in this process or in the pool."""
        self.settle: Callable[[], None] = lambda: None
        """Waits until another thread has done with engine and pool; called before the engine's weights change."""
        self._verifier: WeightVerifier | None = None

    def attach(self, provider: PolicyProvider, ranks: Ranks = ALONE) -> None:
        """Use this policy, on these ranks."""
        self.provider, self.ranks = provider, ranks

    def start_judging(self, rewards: list[Reward], local_processes: int = 1) -> None:
        """Set up these rewards once, and start the pool, shared with ``local_processes`` of the run on this machine."""
        if self.pool is not None and self.pool.rewards == rewards:
            return
        self.stop_judging()
        for reward in rewards:
            with blamed_on(reward, "setup"):
                reward.setup(self.provider.tokenizer)
        if self.reward_pool is not None:
            self.pool = RewardPool(rewards, self.reward_pool.shared_by(local_processes))
            self.pool.say = rank_zero_warn
            self.judge = self.pool

    def stop_judging(self) -> None:
        if self.pool is not None:
            self.pool.close()
        self.pool, self.judge = None, judge_here

    def close(self) -> None:
        self.engine.close()
        self.stop_judging()
        self._verifier = None

    def usable(self, reward: Reward, prompts: Sequence[Prompt], setting: str) -> list[Prompt]:
        """The prompts with a usable gold; see ``on_bad_gold``."""
        return usable_golds(reward, prompts, self.judge, self.on_bad_gold, self.ranks, setting=setting)

    def try_reward(self, reward: Reward, prompts: Sequence[Prompt], sampling: SamplingParams) -> set[str]:
        """Check before training that a reward works and its verdicts arrive; returns the names of its parts."""
        with self.ranks.all_or_none():
            parts = check_reward(reward, prompts, sampling, self.judge)
            check_verdicts(self.pool, reward, prompts, sampling, self.provider.tokenizer)
        return parts

    def sync(self, timer: PhaseTimer, *moment: int | str) -> dict[str, float]:
        """Load the policy's weights into the engine and check them (:class:`WeightVerifier`); returns the metrics."""
        self.settle()
        with timer("sync"):
            self.engine.onload()
            self.engine.load_weights(self.provider.named_full_weights())
        if self.weight_check is None:
            return {}
        with timer("verify"):
            if self._verifier is None:
                self._verifier = WeightVerifier(self.weight_check, self.engine, self.provider, run_seed(), self.ranks)
            return self._verifier.verify(*moment)

    def collect(
        self,
        prompts: Sequence[Prompt],
        seeds: Sequence[Sequence[int]],
        sampling: SamplingParams,
        reward: Reward,
        timer: PhaseTimer,
    ) -> list[Group]:
        """One group per prompt: ``len(seeds[i])`` judged responses to ``prompts[i]``."""
        with timer("generate"):
            generations = self.engine.generate([p.token_ids for p in prompts], sampling, seeds)
        with timer("reward"):
            sampled = zip(generations, seeds, strict=True)
            completions = [self._completions(samples, own_seeds, sampling) for samples, own_seeds in sampled]
            read = [with_prefill(prompt, own) for prompt, own in zip(prompts, completions, strict=True)]
            judged = judge_all(reward, list(zip(prompts, read, strict=True)), self.judge)
        return list(map(Group, prompts, completions, map(tuple, judged)))

    def verifications_stopped(self) -> dict[str, float]:
        """Number of verifications that the pool has stopped so far, by reason."""
        return {why: float(count) for why, count in self.pool.counts.items()} if self.pool else {}

    def take_verdicts(self) -> list[Verdicts]:
        """The pool's verdict counts since the last call, by reward."""
        return self.pool.take_verdicts() if self.pool else []

    def _completions(
        self, samples: Sequence[Generation], seeds: Sequence[int], sampling: SamplingParams
    ) -> tuple[Completion, ...]:
        keep = self.keep_special_tokens
        tokens = [self._without_ending(sample.token_ids) if keep else list(sample.token_ids) for sample in samples]
        texts = self.provider.tokenizer.batch_decode(tokens, skip_special_tokens=not keep)
        return tuple(
            Completion(sample.token_ids, sample.logp, sample.finish_reason, text, sampling.max_tokens, seed)
            for sample, text, seed in zip(samples, texts, seeds, strict=True)
        )

    def _without_ending(self, token_ids: Sequence[int]) -> list[int]:
        """``token_ids`` without trailing EOS and padding."""
        tokenizer, size = self.provider.tokenizer, len(token_ids)
        own = (getattr(tokenizer, name, None) for name in ("eos_token_id", "pad_token_id"))
        ends = {*self.provider.eos_token_ids, *own}
        while size and token_ids[size - 1] in ends:
            size -= 1
        return list(token_ids[:size])


def with_prefill(prompt: Prompt, completions: Sequence[Completion]) -> Sequence[Completion]:
    """The responses as rewards read them: preceded by the prefill, if the prompt has one."""
    if not prompt.prefill:
        return completions
    return [replace(completion, text=prompt.prefill + completion.text) for completion in completions]


def check_reward(
    reward: Reward, prompts: Sequence[Prompt], sampling: SamplingParams, judge: Judge = judge_here
) -> set[str]:
    """Judge an empty response, so that a broken reward fails in the first seconds; returns the names of its parts.

    Uses the first prompt of each part of a mixture, or every prompt if all rewards set ``tells_bad_answers``. Raises
    :class:`RewardError` if the reward raises, returns NaN or has no ``accuracy`` part; or if an answer is unusable.
    """
    if not all(leaf.tells_bad_answers for leaf in reward.leaves()):
        prompts = list({prompt.part: prompt for prompt in reversed(prompts)}.values())
    empty = Completion((), (), "length", "", sampling.max_tokens, seed=0)
    results = [row[0] for row in judge_all(reward, [(prompt, [empty]) for prompt in prompts], judge)]
    if any("accuracy" not in result.parts for result in results):
        raise RewardError(
            f"{type(reward).__name__} names the parts {sorted(results[0].parts)} but no 'accuracy', "
            "which is what is reported and filtered on: add parts={'accuracy': 0 or 1, ...} to its RewardResult"
        )
    return {name for result in results for name in result.parts}
