"""avg@k, pass@k and the rest of an evaluation, as a torchmetrics metric that reduces over ranks."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from ibro_lightning.functional import avg_at_k, bootstrap_interval, pass_at_k
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
    """For j = 1, 2, 4, … and k: the unbiased estimate that one of j fresh samples is right."""
    mean_length: float
    """Response tokens, EOS included."""
    truncated: float
    """Share of responses cut at the length limit."""

    def scalars(self) -> dict[str, float]:
        """The numbers that are drawn as curves."""
        k = self.samples
        return {
            f"avg@{k}": self.avg_at_k.mean,
            f"pass@{k}": self.pass_at_k[k].mean,
            "length": self.mean_length,
            "truncated": self.truncated,
        }

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


class SampleAccuracy(Metric):
    """Collects ``[questions, k]`` accuracies from rollouts; :meth:`compute` gives an :class:`Evaluation`."""

    full_state_update = False
    correct: list[Tensor]
    lengths: list[Tensor]
    truncated: list[Tensor]

    def __init__(self) -> None:
        super().__init__()
        self.add_state("correct", default=[], dist_reduce_fx="cat")
        self.add_state("lengths", default=[], dist_reduce_fx="cat")
        self.add_state("truncated", default=[], dist_reduce_fx="cat")

    def update(self, rollout: Rollout) -> None:
        """Add whole groups, all of the same size."""
        sizes = rollout.groups.bincount()
        if not bool((sizes == sizes[0]).all()) or not bool((rollout.groups.diff() >= 0).all()):
            raise ValueError("an evaluation needs the same number of responses to every prompt, prompt after prompt")
        samples = int(sizes[0])
        self.correct.append(rollout.accuracy.reshape(rollout.num_groups, samples))
        self.lengths.append(rollout.sequences.response_lengths)
        self.truncated.append(rollout.truncated | rollout.late)

    def compute(self) -> Evaluation:
        correct = _cat(self.correct).cpu()
        questions, k = correct.shape
        attempts = sorted({2**power for power in range(k.bit_length()) if 2**power <= k} | {k})
        return Evaluation(
            questions=questions,
            samples=k,
            avg_at_k=_estimate(avg_at_k(correct)),
            pass_at_k={j: _estimate(pass_at_k(correct, j)) for j in attempts},
            mean_length=_cat(self.lengths).double().mean().item(),
            truncated=_cat(self.truncated).double().mean().item(),
        )


def _estimate(per_question: Tensor) -> Estimate:
    return Estimate(per_question.mean().item(), *bootstrap_interval(per_question))


def _cat(values: list[Tensor] | Tensor) -> Tensor:
    """A "cat" state is a list before it is reduced over ranks, and a tensor afterwards."""
    return values if isinstance(values, Tensor) else torch.cat(values)
