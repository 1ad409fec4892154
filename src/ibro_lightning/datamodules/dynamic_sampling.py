"""Dynamic sampling: its options and the groups sampled for a rollout."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch

from ibro_lightning.errors import check_count
from ibro_lightning.functional import informative_groups
from ibro_lightning.ranks import Ranks
from ibro_lightning.sources.pass_rates import Outcome
from ibro_lightning.timing import PhaseTimer
from ibro_lightning.types import Group, check_choice

OnExhausted = Literal["smaller", "fill", "stop"]


@dataclass(frozen=True)
class DynamicSampling:
    """DAPO's dynamic sampling: train only on prompts that the policy sometimes, but not always, gets right.

    Args:
        max_rounds: rounds of generation per rollout, including the first.
        on_exhausted: what to do if the rollout is still incomplete. ``smaller``: train on the informative groups alone.
            ``fill``: add groups that are all right or all wrong; their tokens count, but they have an advantage only
            where another part of the reward differs, which is then not divided by its own standard deviation
            (``docs/rewards.md``). ``stop``: end training with an error. Without any informative group, the first two
            skip the update.
        max_skips: end training after this many consecutive rollouts without an informative group.
    """

    max_rounds: int = 3
    on_exhausted: OnExhausted = "smaller"
    max_skips: int = 10

    def __post_init__(self) -> None:
        check_count("max_rounds", self.max_rounds, 1)
        check_count("max_skips", self.max_skips, 1)
        check_choice("on_exhausted", self.on_exhausted, OnExhausted)


class SampledGroups:
    """The groups sampled for one rollout, by position: this rank's own, and a summary of all ranks' groups."""

    def __init__(self) -> None:
        self.mine: dict[int, Group] = {}
        self.kept: list[int] = []
        self.uninformative: dict[int, bool] = {}
        """``{position: all right?}`` of the groups without variance."""
        self.outcomes: dict[int, Outcome] = {}
        """Of all ranks' groups."""
        self.zero_variance = self.rounds = 0

    def add(self, groups: dict[int, Group], ranks: Ranks, *, filtered: bool) -> None:
        """Add one round's groups of this rank; collective. With ``filtered``, only informative groups are kept."""
        self.mine |= groups
        self.rounds += 1
        accuracy = torch.tensor([result.parts["accuracy"] for group in groups.values() for result in group.results])
        index = torch.tensor([i for i, group in enumerate(groups.values()) for _ in group.results], dtype=torch.long)
        informative = informative_groups(accuracy, index).tolist() if groups else []
        first_right = [group.results[0].parts["accuracy"] > 0 for group in groups.values()]
        outcomes = map(_outcome, groups.values())
        own = dict(zip(groups, zip(informative, first_right, outcomes, strict=True), strict=True))
        everyone = dict(sorted(pair for part in ranks.gather(own) for pair in part.items()))
        self.zero_variance += sum(not useful for useful, _, _ in everyone.values())
        for position, (useful, right, outcome) in everyone.items():
            self.outcomes[position] = outcome
            if useful or not filtered:
                self.kept.append(position)
            else:
                self.uninformative[position] = right

    def metrics(self) -> dict[str, float]:
        sampled = len(self.kept) + len(self.uninformative)
        return {
            "rollout/prompts_sampled": float(sampled),
            "rollout/rounds": float(self.rounds),
            "rollout/zero_variance_groups": self.zero_variance / sampled,
        }

    def totals(self, ranks: Ranks, stopped: Mapping[str, float], timer: PhaseTimer) -> dict[str, float]:
        """Counts summed over ranks, and phase times of the slowest rank."""
        tokens = sum(len(completion.token_ids) for group in self.mine.values() for completion in group.completions)
        counted = {"rollout/generated_tokens": float(tokens), **{f"verifier/{why}": n for why, n in stopped.items()}}
        reports = ranks.gather((counted, timer.metrics()))
        return {
            **{name: sum(counts[name] for counts, _ in reports) for name in counted},
            **{name: max(times.get(name, 0.0) for _, times in reports) for name in reports[0][1]},
        }


def _outcome(group: Group) -> Outcome:
    """A response that its deadline cut, or whose verifier was stopped, says nothing about its prompt."""
    pairs = zip(group.completions, group.results, strict=True)
    judged = [float(result.parts["accuracy"]) for response, result in pairs if not (response.late or result.timed_out)]
    return (math.fsum(judged) / len(judged) if judged else 0.0), len(judged)
