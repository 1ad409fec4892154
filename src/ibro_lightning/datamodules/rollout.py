"""The rollout datamodule: every training batch is generated from the policy's current weights."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from lightning.pytorch.utilities import rank_zero_warn

from ibro_lightning.batches import Rollout
from ibro_lightning.datamodules.dynamic_sampling import DynamicSampling, SampledGroups
from ibro_lightning.datamodules.eval_sets import EvalSet, check_sampling
from ibro_lightning.datamodules.evaluation import EvaluationDataModule, TrainingStream
from ibro_lightning.datamodules.gold_check import OnBadGold
from ibro_lightning.datamodules.lost_verdicts import LostVerdicts
from ibro_lightning.engines.base import RolloutEngine, check_length
from ibro_lightning.engines.weight_check import WeightCheck
from ibro_lightning.errors import ConfigError, RolloutError, check_count, check_instance
from ibro_lightning.rewards import PoolOptions, Reward
from ibro_lightning.rewards.base import check_reward_object
from ibro_lightning.seeding import derive_seed, permutation, run_seed, update_seed
from ibro_lightning.sources.base import PromptSource
from ibro_lightning.sources.control_text import report_shown
from ibro_lightning.sources.prompts import PromptCursor, PromptLimits
from ibro_lightning.timing import PhaseTimer
from ibro_lightning.types import Completion, ControlText, Group, Prompt, RewardResult, SamplingParams


class RolloutDataModule(EvaluationDataModule):
    """Training rollouts (prompts → engine → rewards) and evaluation sets.

    See :class:`EvaluationDataModule` for the arguments from ``engine`` on.

    Args:
        source: training problems.
        reward: judges the responses; its total is the training signal, its "accuracy" part is reported and filtered on.
        sampling: training needs a temperature above 0 and the full distribution (no top_p, top_k, min_p).
        prompts_per_rollout: groups in one rollout, i.e. in one Lightning batch.
        group_size: responses per prompt (n, or G in the papers).
        dynamic_sampling: None trains on every group.
        rollouts_per_epoch: batches per Lightning epoch.
        allow_overlap: allow evaluation sets to share questions with the training problems.
    """

    def __init__(
        self,
        source: PromptSource,
        reward: Reward,
        sampling: SamplingParams = SamplingParams(),
        prompts_per_rollout: int = 32,
        group_size: int = 8,
        dynamic_sampling: DynamicSampling | None = None,
        rollouts_per_epoch: int = 1,
        allow_overlap: bool = False,
        engine: RolloutEngine | None = None,
        eval_sets: dict[str, EvalSet] | None = None,
        test_sets: dict[str, EvalSet] | None = None,
        eval_batch_prompts: int = 64,
        prompt_limits: PromptLimits = PromptLimits(),
        weight_check: WeightCheck | None = WeightCheck(),
        reward_pool: PoolOptions | None = PoolOptions(),
        eval_samples: int | None = None,
        eval_max_tokens: int | None = None,
        chat_template_kwargs: dict[str, Any] | None = None,
        keep_special_tokens: bool = False,
        on_bad_gold: OnBadGold = "refuse",
        control_text: ControlText = "warn",
    ) -> None:
        super().__init__(
            engine=engine,
            eval_sets=eval_sets,
            test_sets=test_sets,
            eval_batch_prompts=eval_batch_prompts,
            prompt_limits=prompt_limits,
            weight_check=weight_check,
            reward_pool=reward_pool,
            eval_samples=eval_samples,
            eval_max_tokens=eval_max_tokens,
            chat_template_kwargs=chat_template_kwargs,
            keep_special_tokens=keep_special_tokens,
            on_bad_gold=on_bad_gold,
            control_text=control_text,
        )
        check_instance("source", source, PromptSource)
        check_reward_object("reward", reward)
        check_instance("dynamic_sampling", dynamic_sampling, DynamicSampling, optional=True)
        check_training_sampling(sampling)
        check_sampling(self.engine, sampling, setting="sampling")
        check_count("prompts_per_rollout", prompts_per_rollout)
        check_count("group_size", group_size)
        check_count("rollouts_per_epoch", rollouts_per_epoch)
        self.source, self.reward, self.sampling = source, reward, sampling
        self.prompts_per_rollout, self.group_size = prompts_per_rollout, group_size
        self.dynamic_sampling, self.rollouts_per_epoch = dynamic_sampling, rollouts_per_epoch
        self.allow_overlap = allow_overlap
        self.allow_other_prompts = False
        """Whether to accept a checkpoint of a run with other prompts (``resume.allow_changes``)."""
        self.iteration = 0
        self._position = 0
        self._skips = 0
        self._lost = LostVerdicts(reward_pool)
        self.prompts: list[Prompt] = []
        """The training prompts; filled by :meth:`setup`."""
        self._cursor: PromptCursor | None = None

    def setup(self, stage: str) -> None:
        super().setup(stage)
        if self._cursor is not None:
            remedy = "write other splits, or allow_overlap: true"
            self.refuse_overlap(self._cursor.prompts, remedy, warn=self.allow_overlap)

    def prepare_training(self, stage: str, rows: int | None) -> None:
        if stage != "fit":
            return
        provider = self.provider
        if self.group_size < provider.min_group_size:
            remedy = f"compares responses to the same prompt: write {provider.min_group_size} or more"
            raise ConfigError("group_size", self.group_size, f"{type(provider).__name__} {remedy}")
        prompts = self.encode_source(self.source, "source", self.chat_template_kwargs, rows=rows)
        report_shown(provider, prompts, self.control_text)
        self.prompts = self.collector.usable(self.reward, prompts, "source")
        parts = self.collector.try_reward(self.reward, self.prompts, self.sampling)
        if provider.min_group_size > 1:
            self._warn_about_shaping(sorted(parts - {"accuracy"}))
        self._cursor = PromptCursor(self.prompts, run_seed(), self.source.weights)

    def check_lengths(self, stage: str, limit: int | None) -> None:
        super().check_lengths(stage, limit)
        if self._cursor is not None:
            check_length([prompt.token_ids for prompt in self.prompts], self.sampling, limit)

    def _warn_about_shaping(self, shaped: Sequence[str]) -> None:
        """Warn if groups of uniform accuracy are trained on the reward's other parts alone."""
        rule = self.dynamic_sampling
        if shaped and (rule is None or rule.on_exhausted == "fill"):
            setting = "null" if rule is None else "on_exhausted: fill"
            groups = f"groups that are all right or all wrong are trained on {', '.join(shaped)} alone, at its own size"
            remedy = "write on_exhausted: smaller to leave them out (docs/rewards.md)"
            rank_zero_warn(f"data.dynamic_sampling: {setting} - {groups}: {remedy}")

    def rewards_of(self, stage: str) -> list[Reward]:
        return [*([self.reward] if stage == "fit" else []), *super().rewards_of(stage)]

    def train_dataloader(self) -> TrainingStream[Rollout]:
        return TrainingStream(self.rollouts_per_epoch, self.next_rollout)

    def state_dict(self) -> dict[str, Any]:
        state = {"iteration": self.iteration, "position": self._position, "skips": self._skips}
        prompts = {} if self._cursor is None else {"prompts": self._cursor.digest}
        return {**state, "lost_rollouts": self._lost.in_a_row, **prompts}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if self._cursor is not None and not self.allow_other_prompts:
            self._cursor.refuse_others(state_dict.get("prompts"))
        self.iteration, self._position = state_dict["iteration"], state_dict["position"]
        self._skips = state_dict["skips"]
        self._lost.in_a_row = state_dict.get("lost_rollouts", 0)

    def next_rollout(self) -> Rollout:
        """Generate this rank's share of a rollout from the policy's current weights."""
        timer, start, lost = PhaseTimer(), self._position, self._lost.in_a_row
        try:
            return self._make_rollout(timer)
        except BaseException:
            # An aborted iteration restarts with the same prompts.
            self._position, self._lost.in_a_row = start, lost
            raise

    def _make_rollout(self, timer: PhaseTimer) -> Rollout:
        self.collector.take_verdicts()  # discard counts of trials and evaluations
        stopped = self.collector.verifications_stopped()
        measured = self.collector.sync(timer, "train", self.iteration)
        sampled = self._collect_groups(timer)
        self.engine.offload()
        stopped = {why: count - stopped[why] for why, count in self.collector.verifications_stopped().items()}
        metrics = {**sampled.metrics(), **sampled.totals(self.ranks, stopped, timer), **measured}
        if self.collector.reward_pool is not None:
            groups, moment = list(sampled.mine.values()), f"iteration {self.iteration + 1}"
            verdicts = self.collector.take_verdicts()
            metrics["verifier/lost_share"] = self._lost.note(groups, verdicts, moment, self.ranks)
        trained, skip = self._select_groups(sampled)
        self.iteration += 1
        own, kept = self._distribute(sampled, trained), set(trained)
        return Rollout.from_groups(
            list(own.values()) or [self._placeholder_group()],
            numbers=list(own) or [len(trained)],
            name="train",
            iteration=self.iteration,
            temperature=self.sampling.temperature,
            dropped=tuple(group for position, group in sampled.mine.items() if position not in kept),
            skip_update=skip,
            metrics=metrics,
            total_groups=len(trained),
            placeholder=not own,
        )

    def _collect_groups(self, timer: PhaseTimer) -> SampledGroups:
        """Sample rounds of groups until enough are informative; one round without dynamic sampling."""
        assert self._cursor is not None, "setup('fit') comes first"
        sampled = SampledGroups()
        max_rounds = self.dynamic_sampling.max_rounds if self.dynamic_sampling else 1
        while len(sampled.kept) < self.prompts_per_rollout and sampled.rounds < max_rounds:
            self._cursor.position = self._position
            draws = self._cursor.draw(self._round_size(len(sampled.kept), len(sampled.uninformative)))
            self._position = self._cursor.position
            with self.ranks.all_or_none():
                groups = self._generate(self.ranks.share(draws), timer)
            sampled.add(groups, self.ranks, filtered=self.dynamic_sampling is not None)
        return sampled

    def _round_size(self, kept: int, uninformative: int) -> int:
        """Number of prompts to sample: those missing, divided by the share that has been informative so far."""
        missing = self.prompts_per_rollout - kept
        share = kept / (kept + uninformative) if kept else 0.0
        return min(self.prompts_per_rollout, math.ceil(missing / share)) if share else self.prompts_per_rollout

    def _generate(self, draws: Sequence[tuple[int, Prompt]], timer: PhaseTimer) -> dict[int, Group]:
        """One group per draw, by position."""
        seed = run_seed()
        seeds = [
            [derive_seed(seed, "train", self.iteration, position, sample) for sample in range(self.group_size)]
            for position, _ in draws
        ]
        prompts = [prompt for _, prompt in draws]
        groups = self.collector.collect(prompts, seeds, self.sampling, self.reward, timer)
        return {position: group for (position, _), group in zip(draws, groups, strict=True)}

    def _select_groups(self, sampled: SampledGroups) -> tuple[list[int], bool]:
        """``(positions of the rollout's groups, whether to skip the update)``; raises RolloutError if exhausted."""
        trained, rule = sampled.kept[: self.prompts_per_rollout], self.dynamic_sampling
        if rule is None:
            return trained, False
        self._skips = 0 if trained else self._skips + 1
        if self._skips >= rule.max_skips or (rule.on_exhausted == "stop" and len(trained) < self.prompts_per_rollout):
            raise RolloutError(self._exhausted_message(rule, sampled))
        if rule.on_exhausted == "fill" or not trained:
            trained += list(sampled.uninformative)[: self.prompts_per_rollout - len(trained)]
        return trained, not sampled.kept

    def _distribute(self, sampled: SampledGroups, trained: list[int]) -> dict[int, Group]:
        """This rank's groups by number; in each step of the first pass, ranks' shares differ by at most one group."""
        if self.ranks.size == 1:
            return {number: sampled.mine[position] for number, position in enumerate(trained)}
        order = permutation(len(trained), update_seed(run_seed(), self.iteration, 0))
        owners = {trained[number]: index % self.ranks.size for index, number in enumerate(order)}
        numbers = {position: number for number, position in enumerate(trained)}
        parcels: list[dict[int, Group]] = [{} for _ in range(self.ranks.size)]
        for position, group in sampled.mine.items():
            if position in owners:
                parcels[owners[position]][numbers[position]] = group
        received = self.ranks.all_to_all(parcels)
        return dict(sorted(pair for parcel in received for pair in parcel.items()))

    def _placeholder_group(self) -> Group:
        """The group of a rank without a share of the rollout; its responses are late, hence masked everywhere."""
        late = Completion((self.provider.eos_token_ids[0],), (0.0,), "deadline", "", self.sampling.max_tokens, 0)
        wrong = RewardResult(0.0, {"accuracy": 0.0})
        return Group(self.prompts[0], (late,) * self.group_size, (wrong,) * self.group_size)

    def _exhausted_message(self, rule: DynamicSampling, sampled: SampledGroups) -> str:
        others, right = len(sampled.uninformative), sum(sampled.uninformative.values())
        remedy = "a larger max_skips" if self._skips >= rule.max_skips else "on_exhausted: fill"  # fill skips as well
        found = f"found {len(sampled.kept)} of {self.prompts_per_rollout} informative groups"
        found += f", and none in {self._skips} rollouts in a row" if self._skips else ""
        found += f"; of {others} others {right} were all right and {others - right} all wrong"
        advice = f"choose problems of medium difficulty, a larger group_size, more max_rounds, or {remedy}"
        return f"data.dynamic_sampling: {found} - {advice}"


def check_training_sampling(sampling: SamplingParams) -> None:
    """Raise :class:`ConfigError` for parameters with which the importance ratios of training would be wrong."""
    check_instance("sampling", sampling, SamplingParams)
    if sampling.temperature == 0:
        raise ConfigError("sampling.temperature", 0, "training needs samples that differ: write a number such as 1.0")
    for name, full in (("top_p", 1.0), ("top_k", 0), ("min_p", 0.0)):
        if (value := getattr(sampling, name)) != full:
            remedy = f"a truncated distribution makes every importance ratio wrong: write {full:g} (except to evaluate)"
            raise ConfigError(f"sampling.{name}", value, remedy)
