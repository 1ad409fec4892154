"""The batches of one evaluation set, generated as they are asked for, by all ranks together."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from ibro_lightning.seeding import derive_seed, run_seed
from ibro_lightning.timing import PhaseTimer
from ibro_lightning.types import Group, Prompt, Rollout

if TYPE_CHECKING:
    from ibro_lightning.datamodules.evaluation import EvalSet, EvaluationDataModule


class EvalStream:
    """One evaluation set as a sized iterable of rollouts, generated as Lightning asks for them.

    Ranks share out the prompts of each batch. A rank that gets none yields a rollout without rows, as all must ask for
    equally many batches.
    """

    def __init__(self, data: EvaluationDataModule, name: str, eval_set: EvalSet) -> None:
        self.data, self.name, self.eval_set = data, name, eval_set

    def __len__(self) -> int:
        return -(-len(self.data.eval_prompts(self.name)) // self.data.eval_batch_prompts)

    def __iter__(self) -> Iterator[Rollout]:
        prompts, size, seed = self.data.eval_prompts(self.name), self.data.eval_batch_prompts, run_seed()
        record, ranks, synced = self.data.record(), self.data.ranks, False
        for batch, start in enumerate(range(0, len(prompts), size)):
            timer, measured = PhaseTimer(), dict[str, float]()
            chunk = prompts[start : start + size]
            seeds = [[self._seed(seed, prompt, sample) for sample in range(self.eval_set.samples)] for prompt in chunk]
            known = ranks.broadcast(record.read(self.name, batch, chunk, seeds) if record else None)
            if known is not None:
                rank_zero_info(f"{self.name}: batch {batch + 1} of {len(self)} is there already")
                groups = ranks.share(known)
            else:
                if not synced:
                    measured, synced = self.data.sync_engine(timer, *self.data.moment(), self.name), True
                with ranks.together():
                    groups = self._generate(ranks.share(chunk), ranks.share(seeds), timer)
            if synced and start + size >= len(prompts):  # nobody asks for more than the last batch
                self.data.engine.offload()
            metrics = {**measured, **timer.metrics()}
            if known is None:
                everyones = ranks.join(groups)
                if record:
                    record.write(self.name, batch, self._rollout(everyones, metrics))
            yield self._rollout(groups, metrics)

    def _rollout(self, groups: list[Group], metrics: dict[str, float]) -> Rollout:
        temperature = self.eval_set.sampling.temperature
        return Rollout.from_groups(groups, name=self.name, iteration=0, temperature=temperature, metrics=metrics)

    def _generate(self, prompts: list[Prompt], seeds: list[list[int]], timer: PhaseTimer) -> list[Group]:
        groups = self.data.collector.collect(prompts, seeds, self.eval_set.sampling, self.eval_set.reward, timer)
        if late := sum(completion.late for group in groups for completion in group.completions):
            rank_zero_warn(f"{self.name}: data.engine.deadline_s cut {late} responses, which count as they are")
        return groups

    def _seed(self, seed: int, prompt: Prompt, sample: int) -> int:
        # Not a function of the iteration: the same random numbers before and after make the difference clearer.
        return derive_seed(seed, "eval", self.name, prompt.id, sample)
