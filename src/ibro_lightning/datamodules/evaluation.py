"""The evaluation datamodule, on which those for training build."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Generic, TypeVar, cast

import lightning.pytorch as pl
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn

from ibro_lightning.datamodules.collector import Collector
from ibro_lightning.datamodules.eval_sets import EvalSet, EvalStream, check_sets, overridden
from ibro_lightning.datamodules.gold_check import OnBadGold
from ibro_lightning.engines import EngineProcess
from ibro_lightning.engines.base import PolicyProvider, RolloutEngine, check_length
from ibro_lightning.engines.weight_check import WeightCheck
from ibro_lightning.errors import ConfigError, check_count, check_instance
from ibro_lightning.evaluation.record import EvaluationRecord, fingerprint
from ibro_lightning.ranks import Ranks
from ibro_lightning.rewards import PoolOptions, Reward
from ibro_lightning.runs.folder import claim_for, evaluation_counts, evaluation_name, is_fast_dev_run, run_folder
from ibro_lightning.runs.holding import RunLock
from ibro_lightning.seeding import run_seed
from ibro_lightning.sources.base import PromptSource
from ibro_lightning.sources.chat_template import check_reserved, check_template_kwargs
from ibro_lightning.sources.contamination import TrainingTexts
from ibro_lightning.sources.prompts import PromptLimits, check_vocabulary, encode_prompts
from ibro_lightning.types import ControlText, Prompt, check_choice

Batch = TypeVar("Batch")


class EvaluationDataModule(pl.LightningDataModule):
    """Evaluates any policy on named sets, with a :class:`Collector`; subclasses add training data.

    Prompts and seeds are identical in every evaluation, so that policies are comparable.

    Args:
        engine: generates the responses; the embedded engine by default.
        eval_sets: used by ``validate`` and by the validation loop during training.
        test_sets: used by ``test`` and ``predict``; the evaluation sets by default.
        eval_batch_prompts: prompts per evaluation batch.
        prompt_limits: how overlong prompts are handled, in every set.
        weight_check: how the engine's weights are checked after every sync; None skips the check.
        reward_pool: worker processes for rewards, which can be stopped when one hangs; None judges in this process.
        eval_samples: overrides ``samples`` of every set, for a quick look.
        eval_max_tokens: overrides ``sampling.max_tokens`` of every set.
        chat_template_kwargs: variables for the policy's chat template, such as ``{enable_thinking: false}``; used in
            training and evaluation.
        keep_special_tokens: keep special tokens (``<think>`` is one in some models) in the text that rewards read.
            Trailing EOS and padding are always removed.
        on_bad_gold: how to handle problems, in training and evaluation, whose gold is unusable: their own verifier
            rejects it or accepts a different value. ``refuse`` stops at the start, ``drop`` removes and counts them.
        control_text: how to handle text in the data that spells a control token of the tokenizer (``<|im_end|>``,
            EOS): ``warn`` counts such rows at the start and encodes it as the token; ``refuse`` stops at the start;
            ``as_text`` encodes it as text. Control tokens written by a chat template or a recipe's template are always
            kept. Details: ``docs/prompts.md``.
    """

    batch_type: type = object  # of the training batches

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
        chat_template_kwargs: dict[str, Any] | None = None,
        keep_special_tokens: bool = False,
        on_bad_gold: OnBadGold = "refuse",
        control_text: ControlText = "warn",
    ) -> None:
        super().__init__()
        check_choice("control_text", control_text, ControlText)
        check_reserved("chat_template_kwargs", chat_template_kwargs)
        check_instance("prompt_limits", prompt_limits, PromptLimits)
        check_count("eval_batch_prompts", eval_batch_prompts)
        self.collector = Collector(engine, weight_check, reward_pool, keep_special_tokens, on_bad_gold)
        self.eval_sets = overridden("eval_sets", eval_sets, eval_samples, eval_max_tokens)
        self.test_sets = overridden("test_sets", test_sets, eval_samples, eval_max_tokens) or self.eval_sets
        check_sets({**self.eval_sets, **self.test_sets}, self.engine)
        self.eval_batch_prompts, self.prompt_limits = eval_batch_prompts, prompt_limits
        self.chat_template_kwargs, self.control_text = chat_template_kwargs, control_text
        self.eval_prompts: dict[str, list[Prompt]] = {}
        """By evaluation set; filled by :meth:`setup`."""
        self._record: EvaluationRecord | None = None
        self._recorded: Path | None = None

    def __str__(self) -> str:
        """Lightning's own would iterate over the batches, and so generate an epoch."""
        return f"{type(self).__name__}(evaluation sets: {', '.join(self.eval_sets) or 'none'})"

    @property
    def engine(self) -> RolloutEngine:
        return self.collector.engine

    @property
    def provider(self) -> PolicyProvider:
        """The run's LightningModule."""
        if self.trainer is None:
            raise RuntimeError("this datamodule is not attached to a Trainer yet")
        return cast(PolicyProvider, self.trainer.lightning_module)

    @property
    def ranks(self) -> Ranks:
        """This process among those that share the data. The first access is collective."""
        return Ranks.of(getattr(self.trainer, "strategy", None))

    def setup(self, stage: str) -> None:
        sets = self.sets_of(stage)
        if self.trainer is not None and sets and stage != TrainerFn.PREDICTING:
            claim_for(self.trainer, "evaluations")
        self.prepare(stage)
        if use_ranks := getattr(self.engine, "use_ranks", None):
            use_ranks(self.ranks)
        self.engine.setup(self.provider.model_spec())
        self.check_lengths(stage, self.engine.max_model_len)

    def _check_batch_type(self) -> None:
        needed = getattr(self.provider, "batch_type", object)
        if self.batch_type is not object and not issubclass(self.batch_type, needed):
            module, data = type(self.provider).__name__, type(self).__name__
            reason = f"it learns from {needed.__name__}, and the batches of {data} are {self.batch_type.__name__}"
            raise ConfigError("model", module, f"{reason}: SFTModule and SFTDataModule belong together")

    def prepare(self, stage: str, rows: int | None = None) -> None:
        """Prepare everything that needs no engine: chat templates, rewards, prompts.

        ``rows`` limits the number of problems per source, and per part of a mixture.
        """
        sets = self.sets_of(stage)
        if stage != "fit" and not sets:
            raise ConfigError("eval_sets", "{}", f"name at least one evaluation set to {TrainerFn(stage).value} on")
        check_provider(self.provider, scores=self.collector.weight_check is not None)
        if stage == "fit":
            self._check_batch_type()
        self.collector.attach(self.provider, self.ranks)
        check_template_kwargs("chat_template_kwargs", self.chat_template_kwargs, self.provider.tokenizer)
        for name, eval_set in {**self.eval_sets, **self.test_sets}.items():
            setting = f"eval_sets.{name}.chat_template_kwargs"
            check_template_kwargs(setting, eval_set.chat_template_kwargs, self.provider.tokenizer)
        self.collector.start_judging(self.rewards_of(stage), getattr(self.trainer, "num_devices", 1))
        self.prepare_training(stage, rows)
        for name, eval_set in sets.items():
            setting, kwargs = f"eval_sets.{name}", self.template_kwargs(eval_set)
            prompts = self.encode_source(eval_set.source, setting, kwargs, eval_set.limit, rows)
            self.eval_prompts[name] = self.collector.usable(eval_set.reward, prompts, setting)
            self.collector.try_reward(eval_set.reward, self.eval_prompts[name], eval_set.sampling)

    def prepare_training(self, stage: str, rows: int | None) -> None:
        """For subclasses; called by :meth:`prepare`."""

    def encode_source(
        self,
        source: PromptSource,
        setting: str,
        chat_template_kwargs: Mapping[str, Any] | None,
        limit: int | None = None,
        rows: int | None = None,
    ) -> list[Prompt]:
        """A source's problems as prompts for this run's model; ``limit``: of prompts, ``rows``: of problems to read."""
        prompts = encode_prompts(
            source,
            self.provider.tokenizer,
            self.prompt_limits,
            setting=setting,
            chat_template_kwargs=chat_template_kwargs,
            control_text=self.control_text,
            first=limit,
            rows=rows,
        )
        check_vocabulary(prompts, self.provider.model_spec(), setting=setting)
        return prompts

    def check_lengths(self, stage: str, limit: int | None) -> None:
        """Raise :class:`ConfigError` if a prompt with its response could exceed ``limit`` tokens."""
        for name, eval_set in self.sets_of(stage).items():
            prompts = [prompt.token_ids for prompt in self.eval_prompts[name]]
            check_length(prompts, eval_set.sampling, limit, setting=f"eval_sets.{name}.sampling")

    def template_kwargs(self, eval_set: EvalSet) -> Mapping[str, Any] | None:
        """The chat template's variables for an evaluation set."""
        own = eval_set.chat_template_kwargs
        return self.chat_template_kwargs if own is None else own

    def sets_of(self, stage: str) -> dict[str, EvalSet]:
        return self.test_sets if stage in ("test", "predict") else self.eval_sets

    def rewards_of(self, stage: str) -> list[Reward]:
        return [eval_set.reward for eval_set in self.sets_of(stage).values()]

    def refuse_overlap(
        self, trained_on: Sequence[Prompt] | Callable[[str], bool], remedy: str, *, warn: bool = False
    ) -> None:
        """Raise :class:`ConfigError`, or ``warn``, if training and evaluation share a question. ``trained_on``: the
        training prompts, compared as in :func:`~ibro_lightning.sources.overlaps`; or a predicate on a prompt's text."""
        find: Callable[[Prompt], object]
        if isinstance(trained_on, Sequence):
            find = TrainingTexts(trained_on).find
        else:
            find = lambda prompt: prompt.id if trained_on(prompt.text) else None  # noqa: E731
        for name in self.eval_sets:
            prompts = self.eval_prompts[name]
            hits = [str(hit) for prompt in prompts if (hit := find(prompt))]
            if not hits:
                continue
            examples = "; ".join(hits[:3]) + ("; …" if len(hits) > 3 else "")
            setting, count = f"eval_sets.{name}", f"{len(hits)} of {len(prompts)} questions"
            if not warn:
                raise ConfigError(setting, count, f"are trained on ({examples}): {remedy}")
            rank_zero_warn(
                f"data.{setting}: {count} are trained on ({examples}): accuracy says little about new problems"
            )

    def teardown(self, stage: str) -> None:
        self.collector.close()
        self._record = self._recorded = None

    def val_dataloader(self) -> list[EvalStream]:
        return self._streams("validate")

    def test_dataloader(self) -> list[EvalStream]:
        return self._streams("test")

    def predict_dataloader(self) -> list[EvalStream]:
        return self.test_dataloader()

    def _streams(self, stage: str) -> list[EvalStream]:
        return [
            EvalStream(self.collector, name, eval_set, self.eval_prompts[name], self.eval_batch_prompts, self.record)
            for name, eval_set in self.sets_of(stage).items()
        ]

    def record(self) -> tuple[EvaluationRecord | None, tuple[str, ...]]:
        """``(record, name)`` of the running evaluation; the name is an empty tuple in ``predict``.

        The record is None in ``predict``, which writes its own files, in ``fast_dev_run``, in a sanity check that does
        not count, and on every rank but the first.
        """
        assert self.trainer is not None
        if self.trainer.predicting:
            return None, ()
        name = evaluation_name(self.trainer)
        if is_fast_dev_run(self.trainer) or not evaluation_counts(self.trainer):
            return None, (name,)
        folder = run_folder(self.trainer) / "evaluations" / name
        if self._recorded != folder:
            RunLock.of(self.trainer).take(self.trainer)
            fitting = self.trainer.state.fn == TrainerFn.FITTING
            digest = None if fitting else self.fingerprint()  # collective: gathers sharded weights
            self._record = EvaluationRecord(folder, digest) if self.ranks.is_first else None
            self._recorded = folder
        return self._record, (name,)

    def fingerprint(self) -> dict[str, str]:
        """Digests of everything that determines the samples and verdicts of the running evaluation."""
        sets = self.sets_of("test" if self.trainer and self.trainer.testing else "validate")
        spec = self.provider.model_spec()
        engine = self.engine.engine if isinstance(self.engine, EngineProcess) else self.engine
        settings = {
            "seed": run_seed(),
            "batch_prompts": self.eval_batch_prompts,
            "engine": [type(engine), engine.dtype],
            "model": [spec.config, spec.eos_token_ids],
            "prompts": {
                name: [[p.id, p.part, p.text, p.token_ids, p.answer, p.meta] for p in self.eval_prompts[name]]
                for name in sets
            },
            "sampling": {name: [eval_set.samples, eval_set.sampling] for name, eval_set in sets.items()},
            "rendering": [
                self.collector.keep_special_tokens,
                {name: self.template_kwargs(eval_set) for name, eval_set in sets.items()},
            ],
            "rewards": {name: eval_set.reward for name, eval_set in sets.items()},
            "reward_pool": self.collector.reward_pool,
        }
        return fingerprint(self.provider.named_full_weights(), settings)


def check_provider(module: object, *, scores: bool) -> None:
    """Raise :class:`ConfigError` for a LightningModule without the members that the datamodules need of one, with
    ``scores`` for the weight check."""
    needed = ["tokenizer", "eos_token_ids", "min_group_size", "model_spec", "named_full_weights"]
    if missing := [name for name in needed + ["response_logp"] * scores if not hasattr(module, name)]:
        remedy = "derive it from ibro_lightning.modules.PolicyProviderMixin, and set policy and tokenizer"
        raise ConfigError("model", type(module).__name__, f"it has no {', '.join(missing)}: {remedy}")


class TrainingStream(Generic[Batch]):
    """The batches of one epoch, generated on demand.

    It has a length because Lightning prefetches from iterables without one, and a prefetched rollout would be one
    update stale.
    """

    def __init__(self, length: int, next_batch: Callable[[], Batch]) -> None:
        self._length, self._next_batch = length, next_batch

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[Batch]:
        for _ in range(self._length):
            yield self._next_batch()
