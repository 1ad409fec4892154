"""Evaluation sets: the same prompts, samples and seeds every time, so that two policies are compared like with like."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import cast

import lightning.pytorch as pl
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn

from ibro_lightning.datamodules.collector import Collector, check_reward
from ibro_lightning.datamodules.contamination import TrainingTexts
from ibro_lightning.datamodules.evaluation_record import EvaluationRecord, fingerprint
from ibro_lightning.datamodules.evaluation_stream import EvalStream
from ibro_lightning.datamodules.prompts import PromptLimits, check_lengths, check_vocabulary, encode_prompts
from ibro_lightning.datamodules.sources import PromptSource
from ibro_lightning.datamodules.weight_check import WeightCheck, WeightVerifier
from ibro_lightning.engines import HFEngine
from ibro_lightning.errors import ConfigError, check_at_least
from ibro_lightning.ranks import Ranks
from ibro_lightning.rewards import Judge, PoolOptions, Reward, RewardPool, judge_here
from ibro_lightning.run_folders import evaluation_name, run_folder
from ibro_lightning.seeding import run_seed
from ibro_lightning.timing import PhaseTimer
from ibro_lightning.types import PolicyProvider, Prompt, RolloutEngine, SamplingParams


@dataclass(frozen=True)
class EvalSet:
    """A named evaluation set.

    Args:
        source: its problems.
        reward: judges the responses.
        samples: k, the responses per problem.
        sampling: its own temperature, top_p and length.
        limit: only the first so many problems; None takes all.
    """

    source: PromptSource
    reward: Reward
    samples: int = 4
    sampling: SamplingParams = field(default_factory=SamplingParams)
    limit: int | None = None


class EvaluationDataModule(pl.LightningDataModule):
    """Evaluates any policy on named sets; the base of the datamodules that train.

    Args:
        engine: generates the responses; the embedded engine if left out.
        eval_sets: used by ``validate`` and, while training, by the validation loop.
        test_sets: used by ``test`` and ``predict``; the evaluation sets if left out.
        eval_batch_prompts: prompts per batch of an evaluation.
        prompt_limits: what happens to prompts that are too long, in every set.
        weight_check: how it is checked after every sync that the engine has the policy's weights; None skips it.
        reward_pool: worker processes for rewards, which stop what hangs; None judges everything in this process.
        eval_samples, eval_max_tokens: instead of every set's own ``samples`` and ``sampling.max_tokens``: a quick look.
    """

    def __init__(
        self,
        engine: RolloutEngine | None = None,
        eval_sets: dict[str, EvalSet] | None = None,
        test_sets: dict[str, EvalSet] | None = None,
        eval_batch_prompts: int = 64,
        prompt_limits: PromptLimits = PromptLimits(),
        weight_check: WeightCheck | None = WeightCheck(),
        reward_pool: PoolOptions | None = PoolOptions(),
        eval_samples: int | None = None,
        eval_max_tokens: int | None = None,
    ) -> None:
        super().__init__()
        self.engine: RolloutEngine = engine or HFEngine()
        self.eval_sets = _overridden(eval_sets or {}, eval_samples, eval_max_tokens)
        self.test_sets = _overridden(test_sets or {}, eval_samples, eval_max_tokens) or self.eval_sets
        self.eval_batch_prompts, self.prompt_limits = eval_batch_prompts, prompt_limits
        self.weight_check, self.reward_pool = weight_check, reward_pool
        self._pool: RewardPool | None = None
        self._record: EvaluationRecord | None = None
        self._recorded: Path | None = None
        self._verifier: WeightVerifier | None = None
        self._eval_prompts: dict[str, list[Prompt]] = {}
        for name, eval_set in {**self.eval_sets, **self.test_sets}.items():
            if not re.fullmatch(r"[\w-]+", name):
                raise ConfigError("data.eval_sets", name, "name sets with letters, digits, '_' and '-' only")
            check_at_least(f"data.eval_sets.{name}.samples", eval_set.samples, 1)
            if eval_set.limit is not None:
                check_at_least(f"data.eval_sets.{name}.limit", eval_set.limit, 1)
        check_at_least("data.eval_batch_prompts", eval_batch_prompts, 1)

    @property
    def provider(self) -> PolicyProvider:
        """The LightningModule of this run, as far as datamodules know it."""
        if self.trainer is None:
            raise RuntimeError("this datamodule is not attached to a Trainer yet")
        return cast(PolicyProvider, self.trainer.lightning_module)

    @property
    def ranks(self) -> Ranks:
        """This process among those that share the data; the first time, all of them must ask."""
        return Ranks.of(getattr(self.trainer, "strategy", None))

    def setup(self, stage: str) -> None:
        provider = self.provider
        sets = self.sets_of(stage)
        if stage != "fit" and not sets:
            raise ConfigError(
                "data.eval_sets", "{}", f"name at least one evaluation set to {TrainerFn(stage).value} on"
            )
        judge = self.start_judging(stage)
        spec = provider.model_spec()
        for name, eval_set in sets.items():
            setting = f"data.eval_sets.{name}"
            prompts = encode_prompts(eval_set.source, provider.tokenizer, self.prompt_limits, setting=setting)
            check_vocabulary(prompts, spec, setting=setting)
            self._eval_prompts[name] = prompts[: eval_set.limit]
            check_reward(eval_set.reward, self._eval_prompts[name], eval_set.sampling, judge)
        self.engine.setup(spec)
        for name, eval_set in sets.items():
            setting = f"data.eval_sets.{name}.sampling"
            check_lengths(self._eval_prompts[name], eval_set.sampling, self.engine.max_model_len, setting=setting)
        self.collector = Collector(self.engine, provider.tokenizer, judge)

    def sets_of(self, stage: str) -> dict[str, EvalSet]:
        """The sets that a stage evaluates on."""
        return self.test_sets if stage in ("test", "predict") else self.eval_sets

    def rewards_of(self, stage: str) -> list[Reward]:
        """The rewards that a stage judges with."""
        return [eval_set.reward for eval_set in self.sets_of(stage).values()]

    def start_judging(self, stage: str) -> Judge:
        """Make the rewards ready, and the pool's processes if any of them wants one."""
        rewards = self.rewards_of(stage)
        if self._pool is None or self._pool.rewards != rewards:
            self.stop_judging()
            for reward in rewards:
                reward.setup(self.provider.tokenizer)
            if self.reward_pool is not None:
                here = getattr(self.trainer, "num_devices", 1)
                self._pool = RewardPool(rewards, self.reward_pool.shared_by(here))
        return self._pool or judge_here

    def verifications_stopped(self) -> dict[str, float]:
        """How many verifications the pool has stopped so far, by reason."""
        return {why: float(count) for why, count in self._pool.counts.items()} if self._pool else {}

    def stop_judging(self) -> None:
        if self._pool is not None:
            self._pool.close()
            self._pool = None

    def refuse_overlap(
        self, trained_on: Sequence[Prompt] | Callable[[str], bool], remedy: str, *, warn: bool = False
    ) -> None:
        """Raise if an evaluation question is trained on, too: its accuracy would say nothing about new problems.

        Args:
            trained_on: the training prompts, compared as :func:`~ibro_lightning.datamodules.overlaps` says; or whether
                a prompt with this text may be trained on.
            remedy: what to write instead.
            warn: warn instead of raising.
        """
        look_up: Callable[[Prompt], object]
        if isinstance(trained_on, Sequence):
            look_up = TrainingTexts(trained_on).find
        else:
            look_up = lambda prompt: prompt.id if trained_on(prompt.text) else None  # noqa: E731
        for name in self.eval_sets:
            prompts = self._eval_prompts[name]
            found = [str(hit) for prompt in prompts if (hit := look_up(prompt))]
            if not found:
                continue
            named = "; ".join(found[:3]) + ("; …" if len(found) > 3 else "")
            setting, count = f"data.eval_sets.{name}", f"{len(found)} of {len(prompts)} questions"
            if not warn:
                raise ConfigError(setting, count, f"are trained on ({named}): {remedy}")
            rank_zero_warn(f"{setting}: {count} are trained on ({named}): its accuracy says little about new problems")

    def val_dataloader(self) -> list[EvalStream]:
        return [EvalStream(self, name, eval_set) for name, eval_set in self.eval_sets.items()]

    def test_dataloader(self) -> list[EvalStream]:
        return [EvalStream(self, name, eval_set) for name, eval_set in self.test_sets.items()]

    def predict_dataloader(self) -> list[EvalStream]:
        return self.test_dataloader()

    def teardown(self, stage: str) -> None:
        self.engine.close()
        self.stop_judging()
        self._record = self._recorded = self._verifier = None

    def sync_engine(self, timer: PhaseTimer, *moment: int | str) -> dict[str, float]:
        """Hand the policy's current weights to the engine, and check that it has them; what the check measured.

        Args:
            moment: where in the run this is, which decides what the engine is asked.

        Raises:
            WeightSyncError: it has not.
        """
        with timer("sync"):
            self.engine.onload()
            self.engine.load_weights(self.provider.named_full_weights())
        if self.weight_check is None:
            return {}
        with timer("verify"):
            if self._verifier is None:
                self._verifier = WeightVerifier(self.weight_check, self.engine, self.provider, run_seed(), self.ranks)
            return self._verifier.verify(*moment)

    def moment(self) -> tuple[str, ...]:
        """Which evaluation this is."""
        return () if self.trainer is None or self.trainer.predicting else (evaluation_name(self.trainer),)

    def eval_prompts(self, name: str) -> list[Prompt]:
        return self._eval_prompts[name]

    def record(self) -> EvaluationRecord | None:
        """Where the samples of the evaluation that is running go; None in ``predict``, which keeps its own, and on
        all processes but the first."""
        assert self.trainer is not None
        if self.trainer.predicting:
            return None
        folder = run_folder(self.trainer) / "evaluations" / evaluation_name(self.trainer)
        if self._recorded != folder:
            fitting = self.trainer.state.fn == TrainerFn.FITTING
            fingerprint = None if fitting else self._fingerprint()  # on all of them: sharded weights are gathered
            self._record = EvaluationRecord(folder, fingerprint) if self.ranks.is_first else None
            self._recorded = folder
        return self._record

    def _fingerprint(self) -> dict[str, str]:
        """All that the samples and verdicts of the running evaluation depend on."""
        sets = self.sets_of("test" if self.trainer and self.trainer.testing else "validate")
        spec = self.provider.model_spec()
        return fingerprint(
            self.provider.named_full_weights(),
            seed=run_seed(),
            batch_prompts=self.eval_batch_prompts,
            engine=[type(self.engine), self.engine.dtype],
            model=[spec.config, spec.eos_token_ids],
            prompts={
                name: [[p.id, p.part, p.text, p.token_ids, p.answer, p.meta] for p in self._eval_prompts[name]]
                for name in sets
            },
            sampling={name: [eval_set.samples, eval_set.sampling] for name, eval_set in sets.items()},
            rewards={name: eval_set.reward for name, eval_set in sets.items()},
            reward_pool=self.reward_pool,
        )


def _overridden(sets: dict[str, EvalSet], samples: int | None, max_tokens: int | None) -> dict[str, EvalSet]:
    for setting, value in (("data.eval_samples", samples), ("data.eval_max_tokens", max_tokens)):
        if value is not None:
            check_at_least(setting, value, 1, ", or null for each set's own")
    return {
        name: replace(
            eval_set,
            samples=eval_set.samples if samples is None else samples,
            sampling=eval_set.sampling if max_tokens is None else replace(eval_set.sampling, max_tokens=max_tokens),
        )
        for name, eval_set in sets.items()
    }
