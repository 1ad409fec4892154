"""Evaluation sets: the same prompts, samples and seeds every time, so that two policies are compared like with like."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import cast

import lightning.pytorch as pl
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn

from ibro_lightning.datamodules.collector import Collector, check_reward
from ibro_lightning.datamodules.prompts import PromptLimits, check_lengths, check_vocabulary, encode_prompts
from ibro_lightning.datamodules.sources import PromptSource
from ibro_lightning.datamodules.weight_check import WeightCheck, WeightVerifier
from ibro_lightning.engines import HFEngine
from ibro_lightning.errors import ConfigError, check_at_least
from ibro_lightning.rewards import Reward
from ibro_lightning.seeding import derive_seed, run_seed
from ibro_lightning.timing import PhaseTimer
from ibro_lightning.types import PolicyProvider, Prompt, Rollout, RolloutEngine, SamplingParams


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
    """

    def __init__(
        self,
        engine: RolloutEngine | None = None,
        eval_sets: dict[str, EvalSet] | None = None,
        test_sets: dict[str, EvalSet] | None = None,
        eval_batch_prompts: int = 64,
        prompt_limits: PromptLimits = PromptLimits(),
        weight_check: WeightCheck | None = WeightCheck(),
    ) -> None:
        super().__init__()
        self.engine: RolloutEngine = engine or HFEngine()
        self.eval_sets = eval_sets or {}
        self.test_sets = test_sets or self.eval_sets
        self.eval_batch_prompts, self.prompt_limits = eval_batch_prompts, prompt_limits
        self.weight_check = weight_check
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

    def setup(self, stage: str) -> None:
        provider = self.provider
        sets = self.test_sets if stage in ("test", "predict") else self.eval_sets
        if stage != "fit" and not sets:
            raise ConfigError(
                "data.eval_sets", "{}", f"name at least one evaluation set to {TrainerFn(stage).value} on"
            )
        spec = provider.model_spec()
        for name, eval_set in sets.items():
            setting = f"data.eval_sets.{name}"
            prompts = encode_prompts(eval_set.source, provider.tokenizer, self.prompt_limits, setting=setting)
            check_vocabulary(prompts, spec, setting=setting)
            self._eval_prompts[name] = prompts[: eval_set.limit]
            eval_set.reward.setup(provider.tokenizer)
            check_reward(eval_set.reward, prompts[0], eval_set.sampling)
        self.engine.setup(spec)
        for name, eval_set in sets.items():
            setting = f"data.eval_sets.{name}.sampling"
            check_lengths(self._eval_prompts[name], eval_set.sampling, self.engine.max_model_len, setting=setting)
        self.collector = Collector(self.engine, provider.tokenizer)

    def refuse_overlap(self, trained_on: Callable[[str], bool], remedy: str) -> None:
        """Raise if an evaluation prompt is also one to train on: its accuracy would say nothing about new problems."""
        for name in self.eval_sets:
            prompts = self._eval_prompts[name]
            if shared := [prompt.text for prompt in prompts if trained_on(prompt.text)]:
                raise ConfigError(
                    f"data.eval_sets.{name}",
                    shared[0],
                    f"{len(shared)} of its {len(prompts)} prompts, such as this one, are trained on: {remedy}",
                )

    def val_dataloader(self) -> list[EvalStream]:
        return [EvalStream(self, name, eval_set) for name, eval_set in self.eval_sets.items()]

    def test_dataloader(self) -> list[EvalStream]:
        return [EvalStream(self, name, eval_set) for name, eval_set in self.test_sets.items()]

    def predict_dataloader(self) -> list[EvalStream]:
        return self.test_dataloader()

    def teardown(self, stage: str) -> None:
        self.engine.close()
        self._verifier = None

    def sync_engine(self, timer: PhaseTimer) -> dict[str, float]:
        """Hand the policy's current weights to the engine, and check that it has them; what the check measured.

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
                self._verifier = WeightVerifier(self.weight_check, self.engine, self.provider, run_seed())
            return self._verifier.verify()

    def eval_prompts(self, name: str) -> list[Prompt]:
        return self._eval_prompts[name]


class EvalStream:
    """One evaluation set as a sized iterable of rollouts, generated as Lightning asks for them."""

    def __init__(self, data: EvaluationDataModule, name: str, eval_set: EvalSet) -> None:
        self.data, self.name, self.eval_set = data, name, eval_set

    def __len__(self) -> int:
        return -(-len(self.data.eval_prompts(self.name)) // self.data.eval_batch_prompts)

    def __iter__(self) -> Iterator[Rollout]:
        timer = PhaseTimer()
        measured = self.data.sync_engine(timer)
        prompts, size, seed = self.data.eval_prompts(self.name), self.data.eval_batch_prompts, run_seed()
        for start in range(0, len(prompts), size):
            chunk = prompts[start : start + size]
            seeds = [[self._seed(seed, prompt, sample) for sample in range(self.eval_set.samples)] for prompt in chunk]
            groups = self.data.collector.collect(chunk, seeds, self.eval_set.sampling, self.eval_set.reward, timer)
            temperature = self.eval_set.sampling.temperature
            if late := sum(completion.late for group in groups for completion in group.completions):
                rank_zero_warn(f"{self.name}: data.engine.deadline_s cut {late} responses, which count as they are")
            if start + size >= len(prompts):  # nobody asks for more than the last batch
                self.data.engine.offload()
            yield Rollout.from_groups(
                groups,
                name=self.name,
                iteration=0,
                temperature=temperature,
                metrics={**measured, **timer.metrics()},
            )
            timer, measured = PhaseTimer(), {}

    def _seed(self, seed: int, prompt: Prompt, sample: int) -> int:
        # Not a function of the iteration: the same random numbers before and after make the difference clearer.
        return derive_seed(seed, "eval", self.name, prompt.id, sample)
