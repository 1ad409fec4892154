"""avg@k, pass@k, maj@k and other evaluation metrics, as a torchmetrics metric that reduces over ranks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from ibro_lightning.batches import Rollout
from ibro_lightning.functional import avg_at_k, bootstrap_interval, majority_at_k, pass_at_k


@dataclass  # not frozen: torchmetrics copies what compute() returns field by field
class Estimate:
    """A mean over questions with its 95 % bootstrap confidence interval."""

    mean: float
    low: float
    high: float


@dataclass
class Evaluation:
    """The metrics of one evaluation set."""

    questions: int
    samples: int
    """k, the responses per question."""
    avg_at_k: Estimate
    pass_at_k: dict[int, Estimate]
    """By j, from 1 to k: the unbiased estimate of the probability that at least one of j samples is correct."""
    maj_at_k: Estimate | None
    """Accuracy of the most frequent answer; None if the verifier does not report the answers it extracts."""
    mean_length: float
    """In tokens, including EOS."""
    truncated: float
    """Share of responses cut off by the length limit or the engine's deadline."""
    extracted: float | None
    """Share of responses in which the verifier found an answer; None if it does not report answers."""
    timed_out: int
    """Responses whose verification was stopped; they count with the configured score."""

    def scalars(self) -> dict[str, float]:
        """The logged scalars, with pass@j for j = 1, 2, 4, … and k.

        avg@k, pass@k and maj@k also appear as ``accuracy``, ``coverage`` and ``majority``, so that monitors need not
        change with k.
        """
        k = self.samples
        attempts = [j for j in self.pass_at_k if j == k or j & (j - 1) == 0]
        majority = self.maj_at_k.mean if self.maj_at_k else None
        optional = {f"maj@{k}": majority, "majority": majority, "extracted": self.extracted}
        return {
            "accuracy": self.avg_at_k.mean,
            "coverage": self.pass_at_k[k].mean,
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
    """Collects accuracies, lengths and answers from rollouts; :meth:`compute` returns an :class:`Evaluation`.

    The result is bitwise independent of how questions are distributed over ranks, some of which may have none. All
    states are flat lists of samples in the metric's dtype, because from a rank without samples torchmetrics gathers an
    empty one-dimensional tensor of that dtype.

    Args:
        process_group: the processes over which the questions are distributed; None: all.
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
        """Add complete, contiguous groups of equal size; raises ValueError for others."""
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
        """The metrics over all ranks; raises ValueError without responses."""
        k = int(self.samples)
        if k == 0:
            raise ValueError("no response was evaluated")
        correct, votes = _cat(self.correct).cpu().reshape(-1, k), _cat(self.votes).cpu().long().reshape(-1, k)
        reported = not bool((votes == SILENT).any())
        return Evaluation(
            questions=len(correct),
            samples=k,
            avg_at_k=_estimate(avg_at_k(correct)),
            pass_at_k={j: _estimate(pass_at_k(correct, j)) for j in range(1, k + 1)},
            maj_at_k=_estimate(majority_at_k(votes, correct)) if reported else None,
            mean_length=_cat(self.lengths).double().mean().item(),
            truncated=_cat(self.cut).double().mean().item(),
            extracted=(votes != NO_ANSWER).double().mean().item() if reported else None,
            timed_out=int(self.timed_out),
        )


NO_ANSWER, SILENT = -1, -2
"""Votes of a response without an answer, and of one whose verifier does not report answers."""


def _votes(answers: Sequence[str | None]) -> Tensor:
    """``[B]``: a number per distinct answer, below 2**24 in one rollout and hence exact in float32."""
    numbers: dict[str, int] = {}
    votes = [
        SILENT if answer is None else NO_ANSWER if not answer else numbers.setdefault(answer, len(numbers))
        for answer in answers
    ]
    return torch.tensor(votes, dtype=torch.long)


def _estimate(per_question: Tensor) -> Estimate:
    # Sorted, because floating-point sums depend on the order.
    return Estimate(per_question.sort().values.mean().item(), *bootstrap_interval(per_question))


def _cat(values: list[Tensor] | Tensor) -> Tensor:
    """A "cat" state, which is a list before the reduction over ranks and a tensor afterwards."""
    return values if isinstance(values, Tensor) else torch.cat(values)


def evaluation_scalars(evaluations: Mapping[str, Evaluation], prefix: str) -> dict[str, float]:
    """All sets' scalars as ``prefix/set/…``, and their mean accuracy as ``prefix/accuracy``, for use as a monitor."""
    scalars = {
        f"{prefix}/{name}/{key}": value
        for name, evaluation in evaluations.items()
        for key, value in evaluation.scalars().items()
    }
    if evaluations:
        means = [evaluation.avg_at_k.mean for evaluation in evaluations.values()]
        scalars[f"{prefix}/accuracy"] = sum(means) / len(means)
    return scalars
