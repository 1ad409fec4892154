"""avg@k, pass@k, maj@k and the rest of an evaluation, as a torchmetrics metric that reduces over ranks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from ibro_lightning.functional import avg_at_k, bootstrap_interval, majority_at_k, pass_at_k
from ibro_lightning.types import Rollout


@dataclass  # not frozen: torchmetrics copies what compute() returns field by field
class Estimate:
    """A mean over questions with its 95 % bootstrap interval."""

    mean: float
    low: float
    high: float


@dataclass
class Evaluation:
    """What one evaluation of one set says."""

    questions: int
    samples: int
    """k, the responses per question."""
    avg_at_k: Estimate
    pass_at_k: dict[int, Estimate]
    """For every j from 1 to k: the unbiased estimate that one of j fresh samples is right."""
    maj_at_k: Estimate | None
    """Accuracy of the answer given most often; None if the verifier does not say which answers it read."""
    mean_length: float
    """Response tokens, EOS included."""
    truncated: float
    """Share of responses cut at the length limit, or at the engine's deadline."""
    extracted: float | None
    """Share of responses in which the verifier found an answer; None if it does not say."""
    timed_out: int
    """Responses whose verification was stopped; they count with the configured score."""

    def scalars(self) -> dict[str, float]:
        """The numbers that are drawn as curves: pass@j for j = 1, 2, 4, … and k."""
        k = self.samples
        attempts = [j for j in self.pass_at_k if j == k or j & (j - 1) == 0]
        optional = {f"maj@{k}": self.maj_at_k.mean if self.maj_at_k else None, "extracted": self.extracted}
        return {
            f"avg@{k}": self.avg_at_k.mean,
            **{f"pass@{j}": self.pass_at_k[j].mean for j in attempts if j > 1 or k == 1},
            **{name: value for name, value in optional.items() if value is not None},
            "length": self.mean_length,
            "truncated": self.truncated,
            "timed_out": float(self.timed_out),
        }

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


class SampleAccuracy(Metric):
    """Collects accuracies, lengths and answers from rollouts; :meth:`compute` gives an :class:`Evaluation`.

    Ranks may have any number of questions, also none: the result is the same, bit for bit, however the questions were
    shared out. Every state is a flat list of samples in the metric's own dtype, because that is what torchmetrics
    gathers from a rank that has seen nothing: no elements, one dimension, that dtype.

    Args:
        process_group: the processes among which the questions were shared out; None: all.
    """

    full_state_update = False
    correct: list[Tensor]
    lengths: list[Tensor]
    cut: list[Tensor]
    votes: list[Tensor]
    samples: Tensor
    timed_out: Tensor

    def __init__(self, process_group: Any = None) -> None:
        super().__init__(process_group=process_group)
        for name in ("correct", "lengths", "cut", "votes"):
            self.add_state(name, default=[], dist_reduce_fx="cat")
        self.add_state("samples", default=torch.tensor(0), dist_reduce_fx="max")
        self.add_state("timed_out", default=torch.tensor(0), dist_reduce_fx="sum")

    def update(self, rollout: Rollout) -> None:
        """Add whole groups, all of the same size.

        Raises:
            ValueError: the groups differ in size, from each other or from those that were added before.
        """
        sizes = rollout.groups.bincount()
        if not bool((sizes == sizes[0]).all()) or not bool((rollout.groups.diff() >= 0).all()):
            raise ValueError("an evaluation needs the same number of responses to every prompt, prompt after prompt")
        if self.samples not in (0, sizes[0]):
            raise ValueError(f"{int(sizes[0])} responses to a prompt, after {int(self.samples)} to those before")
        self.samples = sizes[0].to(self.device)
        votes = _votes([result.answer for result in rollout.results])
        cut = rollout.truncated | rollout.late
        for state, values in (
            (self.correct, rollout.accuracy),
            (self.lengths, rollout.sequences.response_lengths),
            (self.cut, cut),
            (self.votes, votes),
        ):
            state.append(values.to(self.device, self.dtype))
        self.timed_out += sum(result.timed_out for result in rollout.results)

    def compute(self) -> Evaluation:
        """Raises ValueError if no rank has seen a response."""
        k = int(self.samples)
        if k == 0:
            raise ValueError("no response was evaluated")
        correct, votes = _cat(self.correct).cpu().reshape(-1, k), _cat(self.votes).cpu().long().reshape(-1, k)
        says = not bool((votes == SILENT).any())
        return Evaluation(
            questions=len(correct),
            samples=k,
            avg_at_k=_estimate(avg_at_k(correct)),
            pass_at_k={j: _estimate(pass_at_k(correct, j)) for j in range(1, k + 1)},
            maj_at_k=_estimate(majority_at_k(votes, correct)) if says else None,
            mean_length=_cat(self.lengths).double().mean().item(),
            truncated=_cat(self.cut).double().mean().item(),
            extracted=(votes != NO_ANSWER).double().mean().item() if says else None,
            timed_out=int(self.timed_out),
        )


NO_ANSWER, SILENT = -1, -2
"""Votes of a response in which no answer was found, and of one whose verifier does not say."""


def _votes(answers: Sequence[str | None]) -> Tensor:
    """``[B]``: equal answers have equal numbers (below 2**24 in one rollout, which float32 holds exactly)."""
    numbers: dict[str, int] = {}
    votes = [
        SILENT if answer is None else NO_ANSWER if not answer else numbers.setdefault(answer, len(numbers))
        for answer in answers
    ]
    return torch.tensor(votes, dtype=torch.long)


def _estimate(per_question: Tensor) -> Estimate:
    # Sorted, so that not even the last bit depends on the order in which questions came.
    return Estimate(per_question.sort().values.mean().item(), *bootstrap_interval(per_question))


def _cat(values: list[Tensor] | Tensor) -> Tensor:
    """A "cat" state is a list before it is reduced over ranks, and a tensor afterwards."""
    return values if isinstance(values, Tensor) else torch.cat(values)
