"""Splits a rollout into optimizer steps."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ibro_lightning.batches.experience import Experience, OldScores
from ibro_lightning.batches.ragged import Places, put_tokens
from ibro_lightning.regularizers import StepContext
from ibro_lightning.seeding import permutation
from ibro_lightning.update.loss import PolicyLoss


class Steps:
    """The optimizer steps on a rollout: iterating yields each of them, with what the loss has prepared for it.

    If the rollout's first step is to score its own rows (``experience.old_logp`` is None), pass the updated step to
    :meth:`keep`: later steps may have the same rows, and statistics cover the rollout.

    Args:
        experience: the rollout.
        parts: rows of each step, and the seed of its draws.
    """

    def __init__(
        self, experience: Experience, parts: Iterable[tuple[Tensor, int]], loss: PolicyLoss, context: StepContext
    ) -> None:
        self.experience = experience
        self._parts, self._loss, self._context = parts, loss, context
        self._rows = torch.tensor([], dtype=torch.long)

    def __iter__(self) -> Iterator[Experience]:
        for number, (rows, seed) in enumerate(self._parts):
            if number and self.experience.old_logp is None:
                raise RuntimeError(
                    "a second optimizer step needs the log-probs that the first took from its own forward pass: call "
                    "steps.keep(step) with what update() returns"
                )
            self._rows = rows.to(self.experience.groups.device)
            step = rows_of(replace(self.experience, other_rows=None), self._rows)  # [n]
            if step.scored is not None:  # the log-probs of some rows are the sampler's
                step = replace(step, old_entropy=step.old_entropy if bool(step.scored.all()) else None)
            yield self._loss.prepare(step, replace(self._context, seed=seed))

    def keep(self, step: Experience) -> None:
        """Keep the old scores that the first step took from its own forward pass; nothing to do after that."""
        whole = self.experience
        if whole.old_logp is not None:
            return
        assert step.old_logp is not None, "pass the step that update() returns"
        assert step.old_entropy is not None
        scores = whole.other_rows or OldScores.unknown(whole.sequences, step.old_logp.dtype)
        logp, entropy, scored = scores.logp.clone(), scores.entropy.clone(), scores.scored.clone()
        if len(self._rows):  # otherwise the step has a row that does not count
            put_tokens(step.old_logp, logp, whole.lengths, self._rows)
            put_tokens(step.old_entropy, entropy, whole.lengths, self._rows)
            scored[self._rows] = True
        all_scored = None if bool(scored.all()) else scored
        self.experience = replace(whole, old_logp=logp, old_entropy=entropy, scored=all_scored, other_rows=None)


def mini_batches(groups: Tensor, prompts: int | None, seed: int, total: int | None = None) -> Iterator[Tensor]:
    """Rows of each optimizer step: ``prompts`` whole groups in random order; the last step may be smaller. A rank
    without groups of a step gets no rows.

    Args:
        groups: ``[B]`` the group of each row.
        prompts: groups per step; None means all.
        total: groups on all ranks; None: there are no others than these.
    """
    for chosen in group_batches(int(groups.max()) + 1 if total is None else total, prompts, seed):
        yield torch.isin(groups.cpu(), chosen).nonzero().squeeze(-1)


def group_batches(total: int, prompts: int | None, seed: int) -> Sequence[Tensor]:
    """The groups of each optimizer step, in random order: ``prompts`` of ``total``; None means all."""
    order = torch.tensor(permutation(total, seed))
    return order.split(prompts or len(order))


def rows_of(experience: Experience, rows: Tensor) -> Experience:
    """These rows of the rollout; a rank without any takes part in the step with a row that does not count."""
    if len(rows):
        return experience.select(rows)
    step = experience.select(rows.new_zeros(1))
    return replace(step, mask=torch.zeros_like(step.mask))


def with_scores(step: Experience, parts: Sequence[tuple[Tensor, Tensor, Tensor]]) -> Experience:
    """Add the old log-probs and entropies of a step's micro-batches, given as ``(rows, logp, entropy)``; without any,
    the step is unchanged."""
    if not parts:
        return step
    logp, entropy = (values.new_zeros(step.mask.shape) for values in parts[0][1:])  # [N]
    for rows, micro_logp, micro_entropy in parts:
        places = Places.of(step.lengths, rows)
        places.put(micro_logp, logp)
        places.put(micro_entropy, entropy)
    return replace(step, old_logp=logp, old_entropy=entropy)
