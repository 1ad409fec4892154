"""What dynamic sampling knows: the groups of this rank, and which of all ranks' groups are informative."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from ibro_lightning.functional import informative_groups
from ibro_lightning.ranks import Ranks
from ibro_lightning.timing import PhaseTimer
from ibro_lightning.types import Group


class SampledGroups:
    """What was sampled for one rollout: this rank's groups, and what all ranks know of all groups, by position."""

    def __init__(self) -> None:
        self.mine: dict[int, Group] = {}
        self.kept: list[int] = []
        self.spare: dict[int, bool] = {}
        """Groups without variance: were they all right?"""
        self.zero_variance = self.rounds = 0

    def add(self, groups: dict[int, Group], ranks: Ranks, *, filtered: bool) -> None:
        """One more round: the groups of this rank are told to all."""
        self.mine |= groups
        self.rounds += 1
        said = {
            position: (useful, group.results[0].parts["accuracy"] > 0)
            for (position, group), useful in zip(groups.items(), _informative(list(groups.values())), strict=True)
        }
        everyone = dict(sorted(pair for part in ranks.gather(said) for pair in part.items()))
        self.zero_variance += sum(not useful for useful, _ in everyone.values())
        for position, (useful, right) in everyone.items():
            if useful or not filtered:
                self.kept.append(position)
            else:
                self.spare[position] = right

    def metrics(self) -> dict[str, float]:
        sampled = len(self.kept) + len(self.spare)
        return {
            "rollout/prompts_sampled": float(sampled),
            "rollout/rounds": float(self.rounds),
            "rollout/zero_variance_groups": self.zero_variance / sampled,
        }

    def totals(self, ranks: Ranks, stopped: Mapping[str, float], timer: PhaseTimer) -> dict[str, float]:
        """What adds up over the ranks, and how long the slowest one took."""
        tokens = sum(len(completion.token_ids) for group in self.mine.values() for completion in group.completions)
        counted = {"rollout/generated_tokens": float(tokens), **{f"verifier/{why}": n for why, n in stopped.items()}}
        reports = ranks.gather((counted, timer.metrics()))
        return {
            **{name: sum(counts[name] for counts, _ in reports) for name in counted},
            **{name: max(times.get(name, 0.0) for _, times in reports) for name in reports[0][1]},
        }


def _informative(groups: list[Group]) -> list[bool]:
    accuracy = torch.tensor([result.parts["accuracy"] for group in groups for result in group.results])
    index = torch.tensor([i for i, group in enumerate(groups) for _ in group.results], dtype=torch.long)
    return informative_groups(accuracy, index).tolist() if groups else []
