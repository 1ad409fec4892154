"""Makes a rollout from the engine's weights: rounds of dynamic sampling, their rewards, this rank's share."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from ibro_lightning.batches import Rollout
from ibro_lightning.datamodules.collector import Collector
from ibro_lightning.datamodules.dynamic_sampling import DynamicSampling, SampledGroups
from ibro_lightning.datamodules.lost_verdicts import LostVerdicts
from ibro_lightning.errors import RolloutError
from ibro_lightning.ranks import ALONE, Ranks
from ibro_lightning.rewards import Reward
from ibro_lightning.seeding import derive_seed, permutation, run_seed, update_seed
from ibro_lightning.sources.admission import Draws, draws_of
from ibro_lightning.sources.curriculum import Curriculum
from ibro_lightning.sources.pass_rates import PassRates
from ibro_lightning.sources.prompts import PromptCursor
from ibro_lightning.timing import PhaseTimer
from ibro_lightning.types import Completion, Group, Prompt, RewardResult, SamplingParams


@dataclass(frozen=True)
class Progress:
    """How far a run's rollouts have come; with the weights, this determines the next one."""

    iteration: int = 0
    """Rollouts so far."""
    position: int = 0
    """Prompts drawn so far; with a curriculum, those that it passed over included."""
    skips: int = 0
    """Rollouts in a row without an informative group."""
    lost_rollouts: int = 0
    """Rollouts in a row whose verdicts were lost."""
    seen: PassRates | None = None
    """How often each prompt has been answered right; None without a curriculum, and before its first rollout."""

    def state(self) -> dict[str, Any]:
        """Plain values and tensors, for a checkpoint."""
        return {name: value for name, value in asdict(self).items() if value is not None}

    @classmethod
    def of(cls, state: Mapping[str, Any]) -> Progress:
        """Inverse of :meth:`state`."""
        seen = state.get("seen")
        return cls(**{**state, "seen": None if seen is None else PassRates(**seen)})


@dataclass(frozen=True)
class Produced:
    """This rank's share of a rollout, before it becomes tensors."""

    own: Mapping[int, Group]
    """By number over all ranks; empty on a rank without a share."""
    dropped: tuple[Group, ...]
    """Groups that this rank sampled and that are not trained on."""
    total_groups: int
    skip_update: bool
    metrics: Mapping[str, float]
    after: Progress
    """Where the next rollout begins."""


@dataclass(frozen=True)
class RolloutProducer:
    """Arguments: see :class:`RolloutDataModule`.

    Args:
        curriculum: the source of the cursor's prompts, if it is one.
        ahead: rollouts are made in another thread while the policy learns, so the engine stays on its device.
    """

    collector: Collector
    cursor: PromptCursor
    reward: Reward
    sampling: SamplingParams
    prompts_per_rollout: int
    group_size: int
    dynamic_sampling: DynamicSampling | None = None
    curriculum: Curriculum | None = None
    ahead: bool = False
    ranks: Ranks = field(default=ALONE)

    def produce(self, start: Progress, timer: PhaseTimer, measured: Mapping[str, float]) -> Produced:
        """The rollout that begins at ``start``. Collective.

        Args:
            timer: of the rollout; has the time of the sync.
            measured: metrics of the sync.
        """
        self.collector.take_verdicts()  # discard counts of trials and evaluations
        stopped = self.collector.verifications_stopped()
        self.cursor.position = start.position
        draws = draws_of(self.curriculum, self.cursor, start.seen, run_seed())
        sampled = self._collect_groups(draws, start.iteration, timer)
        if not self.ahead:
            self.collector.engine.offload()
        stopped = {why: count - stopped[why] for why, count in self.collector.verifications_stopped().items()}
        metrics = {**sampled.metrics(), **sampled.totals(self.ranks, stopped, timer), **measured}
        metrics |= draws.metrics()
        lost = LostVerdicts(self.collector.reward_pool, start.lost_rollouts)
        if self.collector.reward_pool is not None:
            groups, moment = list(sampled.mine.values()), f"iteration {start.iteration + 1}"
            verdicts = self.collector.take_verdicts()
            metrics["verifier/lost_share"] = lost.note(groups, verdicts, moment, self.ranks)
        trained, skip, skips = self._select_groups(sampled, start.skips)
        seen = draws.seen_after(sampled.outcomes)
        after = Progress(start.iteration + 1, self.cursor.position, skips, lost.in_a_row, seen)
        kept = set(trained)
        return Produced(
            own=self._distribute(sampled, trained, after.iteration),
            dropped=tuple(group for position, group in sampled.mine.items() if position not in kept),
            total_groups=len(trained),
            skip_update=skip,
            metrics=metrics,
            after=after,
        )

    def rollout(self, produced: Produced) -> Rollout:
        """The Lightning batch."""
        own = produced.own
        return Rollout.from_groups(
            list(own.values()) or [self._placeholder_group()],
            numbers=list(own) or [produced.total_groups],
            name="train",
            iteration=produced.after.iteration,
            temperature=self.sampling.temperature,
            dropped=produced.dropped,
            skip_update=produced.skip_update,
            metrics=produced.metrics,
            total_groups=produced.total_groups,
            placeholder=not own,
        )

    def _collect_groups(self, draws: Draws, iteration: int, timer: PhaseTimer) -> SampledGroups:
        """Sample rounds of groups until enough are informative; one round without dynamic sampling."""
        sampled = SampledGroups()
        max_rounds = self.dynamic_sampling.max_rounds if self.dynamic_sampling else 1
        while len(sampled.kept) < self.prompts_per_rollout and sampled.rounds < max_rounds:
            drawn = draws.draw(self._round_size(len(sampled.kept), len(sampled.uninformative)))
            with self.ranks.all_or_none():
                groups = self._generate(self.ranks.share(drawn), iteration, timer)
            sampled.add(groups, self.ranks, filtered=self.dynamic_sampling is not None)
        return sampled

    def _round_size(self, kept: int, uninformative: int) -> int:
        """Number of prompts to sample: those missing, divided by the share that has been informative so far."""
        missing = self.prompts_per_rollout - kept
        share = kept / (kept + uninformative) if kept else 0.0
        return min(self.prompts_per_rollout, math.ceil(missing / share)) if share else self.prompts_per_rollout

    def _generate(self, draws: Sequence[tuple[int, Prompt]], iteration: int, timer: PhaseTimer) -> dict[int, Group]:
        """One group per draw, by position."""
        seed = run_seed()
        seeds = [
            [derive_seed(seed, "train", iteration, position, sample) for sample in range(self.group_size)]
            for position, _ in draws
        ]
        prompts = [prompt for _, prompt in draws]
        groups = self.collector.collect(prompts, seeds, self.sampling, self.reward, timer)
        return {position: group for (position, _), group in zip(draws, groups, strict=True)}

    def _select_groups(self, sampled: SampledGroups, skips: int) -> tuple[list[int], bool, int]:
        """``(positions of the rollout's groups, whether to skip the update, skips in a row)``; raises RolloutError if
        exhausted."""
        trained, rule = sampled.kept[: self.prompts_per_rollout], self.dynamic_sampling
        if rule is None:
            return trained, False, skips
        skips = 0 if trained else skips + 1
        if skips >= rule.max_skips or (rule.on_exhausted == "stop" and len(trained) < self.prompts_per_rollout):
            raise RolloutError(self._exhausted_message(rule, sampled, skips))
        if rule.on_exhausted == "fill" or not trained:
            trained += list(sampled.uninformative)[: self.prompts_per_rollout - len(trained)]
        return trained, not sampled.kept, skips

    def _exhausted_message(self, rule: DynamicSampling, sampled: SampledGroups, skips: int) -> str:
        others, right = len(sampled.uninformative), sum(sampled.uninformative.values())
        remedy = "a larger max_skips" if skips >= rule.max_skips else "on_exhausted: fill"  # fill skips as well
        found = f"found {len(sampled.kept)} of {self.prompts_per_rollout} informative groups"
        found += f", and none in {skips} rollouts in a row" if skips else ""
        found += f"; of {others} others {right} were all right and {others - right} all wrong"
        advice = f"choose problems of medium difficulty, a larger group_size, more max_rounds, or {remedy}"
        return f"data.dynamic_sampling: {found} - {advice}"

    def _distribute(self, sampled: SampledGroups, trained: list[int], iteration: int) -> dict[int, Group]:
        """This rank's groups by number; in each step of the first pass, ranks' shares differ by at most one group."""
        if self.ranks.size == 1:
            return {number: sampled.mine[position] for number, position in enumerate(trained)}
        owners = dict(zip(trained, owners_of(len(trained), iteration, self.ranks.size), strict=True))
        numbers = {position: number for number, position in enumerate(trained)}
        parcels: list[dict[int, Group]] = [{} for _ in range(self.ranks.size)]
        for position, group in sampled.mine.items():
            if position in owners:
                parcels[owners[position]][numbers[position]] = group
        received = self.ranks.all_to_all(parcels)
        return dict(sorted(pair for parcel in received for pair in parcel.items()))

    def _placeholder_group(self) -> Group:
        """The group of a rank without a share of the rollout; its responses are late, hence masked everywhere."""
        eos = self.collector.provider.eos_token_ids[0]
        late = Completion((eos,), (0.0,), "deadline", "", self.sampling.max_tokens, 0)
        wrong = RewardResult(0.0, {"accuracy": 0.0})
        return Group(self.cursor.prompts[0], (late,) * self.group_size, (wrong,) * self.group_size)


def owners_of(count: int, iteration: int, ranks: int) -> list[int]:
    """The rank that trains on each of a rollout's groups, by number."""
    owners = [0] * count
    for index, number in enumerate(permutation(count, update_seed(run_seed(), iteration, 0))):
        owners[number] = index % ranks
    return owners
