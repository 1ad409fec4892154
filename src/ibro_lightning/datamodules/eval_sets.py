"""Evaluation sets, their validation and their batches."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from ibro_lightning.batches import Rollout
from ibro_lightning.batches.sequences import repr_of_shapes
from ibro_lightning.datamodules.collector import Collector
from ibro_lightning.datamodules.lost_verdicts import LostVerdicts
from ibro_lightning.engines.base import RolloutEngine
from ibro_lightning.errors import ConfigError, check_count, check_instance
from ibro_lightning.evaluation.record import EvaluationRecord
from ibro_lightning.rewards.base import Reward, check_reward_object
from ibro_lightning.seeding import derive_seed, run_seed
from ibro_lightning.sources.base import PromptSource
from ibro_lightning.sources.chat_template import check_reserved
from ibro_lightning.timing import PhaseTimer
from ibro_lightning.types import Group, Prompt, SamplingParams


@dataclass(frozen=True, repr=False)
class EvalSet:
    """A named evaluation set.

    Args:
        source: its problems.
        reward: judges the responses.
        samples: k, the responses per problem.
        sampling: temperature, top_p and length of this set.
        limit: use only the first ``limit`` problems; None uses all.
        chat_template_kwargs: replaces the datamodule's.
    """

    source: PromptSource
    reward: Reward
    samples: int = 4
    sampling: SamplingParams = field(default_factory=SamplingParams)
    limit: int | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        check_instance("source", self.source, PromptSource)
        check_reward_object("reward", self.reward)
        check_count("samples", self.samples)
        check_instance("sampling", self.sampling, SamplingParams)
        if self.limit is not None:
            check_count("limit", self.limit)

    __repr__ = repr_of_shapes


def check_sampling(engine: RolloutEngine, sampling: SamplingParams, *, setting: str) -> None:
    """Call the engine's ``check_sampling``; an engine without it supports all :class:`SamplingParams`."""
    if check := getattr(engine, "check_sampling", None):
        check(sampling, setting=setting)


def overridden(
    setting: str, sets: Mapping[str, EvalSet] | None, samples: int | None, max_tokens: int | None
) -> dict[str, EvalSet]:
    """The sets with ``samples`` and ``sampling.max_tokens`` replaced where a value is given."""
    sets = {} if sets is None else sets
    if not isinstance(sets, Mapping):
        raise ConfigError(setting, sets, "write an EvalSet for each name, as in {'aime': EvalSet(source, reward)}")
    for name, eval_set in sets.items():
        check_instance(f"{setting}.{name}", eval_set, EvalSet, ", with a source and a reward")
    for override, value in (("eval_samples", samples), ("eval_max_tokens", max_tokens)):
        if value is not None:
            check_count(override, value, 1, ", or null for each set's own")
    return {
        name: replace(
            eval_set,
            samples=eval_set.samples if samples is None else samples,
            sampling=eval_set.sampling if max_tokens is None else replace(eval_set.sampling, max_tokens=max_tokens),
        )
        for name, eval_set in sets.items()
    }


def check_sets(sets: Mapping[str, EvalSet], engine: RolloutEngine) -> None:
    """Raise :class:`ConfigError` for invalid names, numbers or sampling parameters."""
    for name, eval_set in sets.items():
        if not re.fullmatch(r"[\w-]+", name):
            raise ConfigError("eval_sets", name, "name sets with letters, digits, '_' and '-' only")
        check_reserved(f"eval_sets.{name}.chat_template_kwargs", eval_set.chat_template_kwargs)
        check_sampling(engine, eval_set.sampling, setting=f"eval_sets.{name}.sampling")


class EvalStream:
    """One evaluation set as a sized iterable of rollouts, generated on demand.

    Each batch's prompts are divided among the ranks. A rank without prompts yields a rollout without rows, since all
    ranks must iterate over the same number of batches.

    Args:
        prompts: the set's prompts, in order.
        batch_prompts: prompts per batch, over all ranks.
        record: called when an evaluation begins; returns the record of its samples and its name.
    """

    def __init__(
        self,
        collector: Collector,
        name: str,
        eval_set: EvalSet,
        prompts: Sequence[Prompt],
        batch_prompts: int,
        record: Callable[[], tuple[EvaluationRecord | None, tuple[str, ...]]],
    ) -> None:
        self.collector, self.name, self.eval_set = collector, name, eval_set
        self.prompts, self.batch_prompts, self._record = prompts, batch_prompts, record

    def __len__(self) -> int:
        return -(-len(self.prompts) // self.batch_prompts)

    def __iter__(self) -> Iterator[Rollout]:
        collector, ranks, eval_set = self.collector, self.collector.ranks, self.eval_set
        size, seed = self.batch_prompts, run_seed()
        (record, evaluation), synced = self._record(), False
        lost, stopped, asked = LostVerdicts(collector.reward_pool), 0.0, 0
        for batch, start in enumerate(range(0, len(self.prompts), size)):
            timer, measured = PhaseTimer(), dict[str, float]()
            chunk = list(self.prompts[start : start + size])
            # Independent of the iteration: common random numbers reduce the variance of differences between policies.
            seeds = [
                [derive_seed(seed, "eval", self.name, prompt.id, sample) for sample in range(eval_set.samples)]
                for prompt in chunk
            ]
            recorded = ranks.broadcast(record.read(self.name, batch, chunk, seeds) if record else None)
            if recorded is not None:
                rank_zero_info(f"{self.name}: batch {batch + 1} of {len(self)} is already recorded")
                groups = ranks.share(recorded)
            else:
                if not synced:
                    measured, synced = collector.sync(timer, *evaluation, self.name), True
                collector.take_verdicts()  # discard earlier counts
                with ranks.all_or_none():
                    prompts, own_seeds = ranks.share(chunk), ranks.share(seeds)
                    groups = collector.collect(prompts, own_seeds, eval_set.sampling, eval_set.reward, timer)
                if late := sum(completion.late for group in groups for completion in group.completions):
                    rank_zero_warn(f"{self.name}: data.engine.deadline_s cut {late} responses, which count as they are")
                moment = f"{self.name}, batch {batch + 1} of {len(self)}"
                stopped += len(chunk) * lost.note(groups, collector.take_verdicts(), moment, ranks)
                asked += len(chunk)
            last = start + size >= len(self.prompts)
            if synced and last:  # code after the last yield may not run
                collector.engine.offload()
            metrics = {**measured, **timer.metrics()}
            if asked and collector.reward_pool is not None and last:
                metrics["verifier/lost_share"] = stopped / asked
            if recorded is None:
                all_groups = ranks.join(groups)
                if record:
                    record.write(self.name, batch, self._rollout(all_groups, metrics))
            yield self._rollout(groups, metrics)

    def _rollout(self, groups: list[Group], metrics: dict[str, float]) -> Rollout:
        temperature = self.eval_set.sampling.temperature
        return Rollout.from_groups(groups, name=self.name, iteration=0, temperature=temperature, metrics=metrics)
