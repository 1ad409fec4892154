"""The rollout datamodule: every training batch is generated from the policy's current weights, or from those of one
update ago."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from lightning.pytorch.utilities import rank_zero_warn

from ibro_lightning.batches import Rollout
from ibro_lightning.datamodules.dynamic_sampling import DynamicSampling
from ibro_lightning.datamodules.eval_sets import EvalSet, check_sampling
from ibro_lightning.datamodules.evaluation import EvaluationDataModule, TrainingStream
from ibro_lightning.datamodules.gold_check import OnBadGold
from ibro_lightning.datamodules.in_flight import STOP_S, InFlight, restored
from ibro_lightning.datamodules.producer import Produced, Progress, RolloutProducer
from ibro_lightning.engines import EngineProcess
from ibro_lightning.engines.base import RolloutEngine, check_length
from ibro_lightning.engines.weight_check import WeightCheck
from ibro_lightning.errors import ConfigError, check_count, check_instance
from ibro_lightning.rewards import PoolOptions, Reward
from ibro_lightning.rewards.base import check_reward_object
from ibro_lightning.seeding import run_seed
from ibro_lightning.sources.base import PromptSource
from ibro_lightning.sources.control_text import report_shown
from ibro_lightning.sources.curriculum import Curriculum
from ibro_lightning.sources.prompts import PromptCursor, PromptLimits
from ibro_lightning.timing import PhaseTimer
from ibro_lightning.types import ControlText, Prompt, SamplingParams


class RolloutDataModule(EvaluationDataModule):
    """Training rollouts (prompts → engine → rewards) and evaluation sets.

    See :class:`EvaluationDataModule` for the arguments from ``engine`` on.

    Args:
        source: training problems; a :class:`.Curriculum` asks them by how often they have been answered right.
        reward: judges the responses; its total is the training signal, its "accuracy" part is reported and filtered on.
        sampling: training needs a temperature above 0 and the full distribution (no top_p, top_k, min_p).
        prompts_per_rollout: groups in one rollout, i.e. in one Lightning batch.
        group_size: responses per prompt (n, or G in the papers).
        dynamic_sampling: None trains on every group.
        rollouts_per_epoch: batches per Lightning epoch.
        max_staleness: updates between sampling and training. 0: none, generation and update take turns. 1: while the
            policy learns from a rollout, the next one is generated from the weights before that, by the engine in a
            process of its own (:class:`.EngineProcess`); the loss has to weigh its tokens (``docs/overlap.md``).
        allow_overlap: allow evaluation sets to share questions with the training problems.
    """

    batch_type = Rollout

    def __init__(
        self,
        source: PromptSource,
        reward: Reward,
        sampling: SamplingParams = SamplingParams(),
        prompts_per_rollout: int = 32,
        group_size: int = 8,
        dynamic_sampling: DynamicSampling | None = None,
        rollouts_per_epoch: int = 1,
        max_staleness: int = 0,
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
        if type(max_staleness) is not int or max_staleness not in (0, 1):
            raise ConfigError("max_staleness", max_staleness, "write 0, or 1 to generate while the policy learns")
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
        self.max_staleness = max_staleness
        if max_staleness and not isinstance(self.engine, EngineProcess):
            self.collector.engine = EngineProcess(self.engine)
        self.collector.settle = self._settle
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
        self.progress = Progress()
        self.prompts: list[Prompt] = []
        """The training prompts; filled by :meth:`setup`."""
        self._cursor: PromptCursor | None = None
        self._producer: RolloutProducer
        self._next: InFlight | None = None
        """The rollout that :meth:`next_rollout` will return, if its making has begun (``max_staleness``)."""
        self._stored: dict[str, Any] | None = None
        """The same as a checkpoint has it, until it is asked for."""

    def setup(self, stage: str) -> None:
        super().setup(stage)
        if self._cursor is None:
            return
        remedy = "write other splits, or allow_overlap: true"
        self.refuse_overlap(self._cursor.prompts, remedy, warn=self.allow_overlap)
        if stage != "fit":
            return
        self._producer = RolloutProducer(
            self.collector,
            self._cursor,
            self.reward,
            self.sampling,
            prompts_per_rollout=self.prompts_per_rollout,
            group_size=self.group_size,
            dynamic_sampling=self.dynamic_sampling,
            curriculum=self.source if isinstance(self.source, Curriculum) else None,
            ahead=self.max_staleness > 0,
            ranks=self.ranks.for_another_thread() if self.max_staleness else self.ranks,
        )

    def teardown(self, stage: str) -> None:
        self._abandon()
        super().teardown(stage)

    def on_exception(self, exception: BaseException) -> None:
        """After an error Lightning tears nothing down. Callbacks have written their checkpoint by now."""
        self._abandon()

    def _abandon(self) -> None:
        """End the engine, and with it what a thread generates."""
        if isinstance(self.engine, EngineProcess):
            self.engine.close()
        if self._next is not None:
            self._next.settle(STOP_S)
        self._next = None

    def prepare_training(self, stage: str, rows: int | None) -> None:
        if stage != "fit":
            return
        provider = self.provider
        for part in (provider, getattr(provider, "regularizer", None)):
            if self.group_size < (least := getattr(part, "min_group_size", 1)):
                remedy = f"{type(part).__name__} compares responses to the same prompt: write {least} or more"
                raise ConfigError("group_size", self.group_size, remedy)
        if self.max_staleness and not getattr(provider, "learns_off_policy", False):
            reason = f"{type(provider).__name__} would take tokens of earlier weights for the policy's own"
            remedy = "write model.sampler_correction, which weighs them (in a module of your own: weigh them, and set "
            raise ConfigError("max_staleness", self.max_staleness, f"{reason}: {remedy}learns_off_policy), or 0")
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

    @property
    def iteration(self) -> int:
        """Rollouts of the run so far."""
        return self.progress.iteration

    def state_dict(self) -> dict[str, Any]:
        """Waits for a rollout that is being made, which is part of the state. Collective."""
        state = self.progress.state()
        if self._cursor is not None:
            state["prompts"] = self._cursor.digest
        following = self._stored if self._next is None else self._next.state(self.ranks)
        return state if following is None else {**state, "next": following}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        state = dict(state_dict)
        following, prompts = state.pop("next", None), state.pop("prompts", None)
        if self._cursor is not None and not self.allow_other_prompts:
            self._cursor.refuse_others(prompts)
        self.progress = Progress.of(state)
        self._stored = following if self.max_staleness else None

    def next_rollout(self) -> Rollout:
        """This rank's share of the next rollout. If that fails, the next call begins again with the same prompts."""
        produced = self._take() if self.max_staleness else self._begin(self.progress)()
        self.progress = produced.after
        return self._producer.rollout(produced)

    def _begin(self, start: Progress) -> Callable[[], Produced]:
        """Load and check the current weights for the rollout that begins at ``start``; returns what makes it."""
        timer = PhaseTimer()
        measured = self.collector.sync(timer, "train", start.iteration)
        if self.max_staleness:
            measured["rollout/staleness"] = float(start.iteration - self.progress.iteration)
        return partial(self._producer.produce, start, timer, measured)

    def _take(self) -> Produced:
        """The rollout that was made while the policy learned from the one before; begins the one after it."""
        if self._next is None:
            self._next = self._restore() or InFlight.begin(self._begin(self.progress))
        timer = PhaseTimer()
        try:
            with timer("wait"), self.ranks.all_or_none():
                produced = self._next.result()
            following = InFlight.begin(self._begin(produced.after)) if self._another_follows() else None
        except Exception:  # not Interrupted: then it is part of the checkpoint
            self._next = None
            raise
        self._next = following
        return replace(produced, metrics={**produced.metrics, **timer.metrics()})

    def _restore(self) -> InFlight | None:
        """The rollout in the checkpoint; None if there is none, or if it answers other prompts than this run's."""
        stored, self._stored = self._stored, None
        produced = None if stored is None else restored(stored, self.prompts, self.ranks)
        return None if produced is None else InFlight.landed(produced)

    def _settle(self) -> None:
        if self._next is not None:
            self._next.settle()

    def _another_follows(self) -> bool:
        """Whether training wants another rollout after the one that it is about to get, as far as can be known."""
        trainer: Any = self.trainer
        if trainer.max_steps != -1 and trainer.global_step + 1 >= trainer.max_steps:
            return False
        done = trainer.fit_loop.epoch_loop.batch_progress.current.ready
        if done + 1 < trainer.num_training_batches:
            return True
        return trainer.max_epochs in (None, -1) or trainer.current_epoch + 1 < trainer.max_epochs


def check_training_sampling(sampling: SamplingParams) -> None:
    """Raise :class:`ConfigError` for parameters with which the importance ratios of training would be wrong."""
    check_instance("sampling", sampling, SamplingParams)
    if sampling.temperature == 0:
        raise ConfigError("sampling.temperature", 0, "training needs samples that differ: write a number such as 1.0")
    for name, full in (("top_p", 1.0), ("top_k", 0), ("min_p", 0.0)):
        if (value := getattr(sampling, name)) != full:
            remedy = f"a truncated distribution makes every importance ratio wrong: write {full:g} (except to evaluate)"
            raise ConfigError(f"sampling.{name}", value, remedy)
