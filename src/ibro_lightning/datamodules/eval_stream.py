"""The batches of one evaluation set, generated on demand."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from ibro_lightning.batches import Rollout
from ibro_lightning.datamodules.collector import Collector
from ibro_lightning.datamodules.eval_sets import EvalSet
from ibro_lightning.datamodules.lost_verdicts import LostVerdicts
from ibro_lightning.evaluation.record import EvaluationRecord
from ibro_lightning.seeding import derive_seed, run_seed
from ibro_lightning.timing import PhaseTimer
from ibro_lightning.types import Group, Prompt


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
        collector, ranks, size, seed = self.collector, self.collector.ranks, self.batch_prompts, run_seed()
        (record, evaluation), synced = self._record(), False
        lost, stopped, asked = LostVerdicts(collector.reward_pool), 0.0, 0
        for batch, start in enumerate(range(0, len(self.prompts), size)):
            timer, measured = PhaseTimer(), dict[str, float]()
            chunk = list(self.prompts[start : start + size])
            seeds = [[self._seed(seed, prompt, sample) for sample in range(self.eval_set.samples)] for prompt in chunk]
            recorded = ranks.broadcast(record.read(self.name, batch, chunk, seeds) if record else None)
            if recorded is not None:
                rank_zero_info(f"{self.name}: batch {batch + 1} of {len(self)} is there already")
                groups = ranks.share(recorded)
            else:
                if not synced:
                    measured, synced = collector.sync(timer, *evaluation, self.name), True
                collector.take_verdicts()  # discard earlier counts
                with ranks.all_or_none():
                    groups = self._generate(ranks.share(chunk), ranks.share(seeds), timer)
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

    def _generate(self, prompts: list[Prompt], seeds: list[list[int]], timer: PhaseTimer) -> list[Group]:
        groups = self.collector.collect(prompts, seeds, self.eval_set.sampling, self.eval_set.reward, timer)
        if late := sum(completion.late for group in groups for completion in group.completions):
            rank_zero_warn(f"{self.name}: data.engine.deadline_s cut {late} responses, which count as they are")
        return groups

    def _seed(self, seed: int, prompt: Prompt, sample: int) -> int:
        # Independent of the iteration: common random numbers reduce the variance of differences between policies.
        return derive_seed(seed, "eval", self.name, prompt.id, sample)
