"""A few prompts of a rollout, each with one response, and every response scored under every prompt."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ibro_lightning.batches.ragged import row_sums
from ibro_lightning.batches.rollout_batch import Rollout
from ibro_lightning.batches.sequences import FlatSequences
from ibro_lightning.ranks import ALONE, Ranks
from ibro_lightning.seeding import derive_seed, run_seed
from ibro_lightning.types import Completion, Prompt

Score = Callable[..., tuple[Tensor, Tensor]]
"""``score(sequences, temperature, with_entropy=…)`` → ``(logp, entropy)`` ``[N]``; see :meth:`.Scorer.score`."""


@dataclass(frozen=True)
class Probe:
    """M different prompts and a response to each, as token ids; the same on all ranks."""

    prompts: Sequence[Sequence[int]]
    responses: Sequence[Sequence[int]]

    @classmethod
    def of(cls, rollout: Rollout, count: int, ranks: Ranks = ALONE) -> Probe | None:
        """Up to ``count`` of the prompts that an iteration has sampled responses to, at random, and the first response
        to each. None if there are less than two. Collective.

        Groups that dynamic sampling dropped count as well: the choice does not depend on what was right. Neither does
        it depend on the number of ranks. A response that was cut by a deadline is passed over.
        """
        own: dict[int, tuple[list[int], list[int]]] = {}
        for prompt, completions in _groups(rollout):
            answers = [c for c in completions if not c.late and len(c.token_ids)]
            key = derive_seed(run_seed(), "probe", rollout.iteration, repr(tuple(prompt.token_ids)))
            if answers and key not in own:
                own[key] = list(prompt.token_ids), list(answers[0].token_ids)
        first = dict(sorted(own.items())[:count])
        merged = dict(pair for share in reversed(ranks.gather(first)) for pair in share.items())
        chosen = [merged[key] for key in sorted(merged)[:count]]
        if len(chosen) < 2:
            return None
        return cls([prompt for prompt, _ in chosen], [response for _, response in chosen])

    def __len__(self) -> int:
        return len(self.prompts)

    def cross_logp(self, score: Score, temperature: float, device: torch.device, ranks: Ranks = ALONE) -> Tensor:
        """``[M, M]`` float64: the log-probability of response i after prompt j. Collective: each rank scores every
        response under its own share of the prompts.

        Args:
            score: of the policy.
            temperature: at which the responses were sampled.
        """
        mine = ranks.share(range(len(self)))
        # All ranks take part in the forward passes of a sharded policy; one without a share scores one prompt in vain.
        columns = mine or [0]
        prompts = [self.prompts[column] for column in columns for _ in self.responses]
        sequences = FlatSequences.collate(prompts, [*self.responses] * len(columns)).to(device)
        logp, _ = score(sequences, temperature, with_entropy=False)  # [N]
        sums = row_sums(logp.double(), sequences.response_lengths).reshape(len(columns), len(self))
        matrix = torch.zeros(len(self), len(self), dtype=torch.float64, device=device)  # [M, M]
        if mine:
            matrix[:, mine] = sums.T
        return ranks.sum(matrix)


def surprise(rollout: Rollout, ranks: Ranks = ALONE) -> tuple[Tensor, Tensor] | None:
    """``(−log π(r|q) [P], tokens [P])`` of each of an iteration's prompts, float64 means over its sampled responses, by
    the log-probs that they were sampled with. None if the engine gave some responses none. Collective.

    Groups that dynamic sampling dropped count as well; responses that were cut by a deadline do not.
    """
    rows, complete = list[tuple[float, float]](), True
    for _, completions in _groups(rollout):
        sampled = [(np.asarray(c.logp, np.float64), len(c.token_ids)) for c in completions if not c.late]
        complete = complete and all(len(nats) == count and np.isfinite(nats).all() for nats, count in sampled)
        if sampled:
            sums = [(-nats.sum(), count) for nats, count in sampled]
            rows.append((sum(nats for nats, _ in sums) / len(sums), sum(count for _, count in sums) / len(sums)))
    shares = ranks.gather((complete, rows))
    gathered = torch.tensor([row for _, share in shares for row in share], dtype=torch.float64).reshape(-1, 2)
    if not all(complete for complete, _ in shares) or len(gathered) < 2:
        return None
    return gathered[:, 0], gathered[:, 1]


def _groups(rollout: Rollout) -> Iterator[tuple[Prompt, Sequence[Completion]]]:
    """This rank's prompts with their responses, those that are not trained on included."""
    rows: dict[int, list[int]] = {}
    for row, group in enumerate([] if rollout.placeholder else rollout.groups.tolist()):
        rows.setdefault(group, []).append(row)
    for own in rows.values():
        yield rollout.prompts[own[0]], [rollout.completions[row] for row in own]
    for group in rollout.dropped:
        yield group.prompt, group.completions
