"""Accuracy over ``k`` samples per question, and its uncertainty."""

from __future__ import annotations

import torch
from torch import Tensor

from ibro_lightning import resampling


def avg_at_k(correct: Tensor) -> Tensor:
    """Mean accuracy per question: ``[Q, k]`` (1 right, 0 wrong) → ``[Q]``. The mean over questions is avg@k."""
    return correct.double().mean(dim=1)


def pass_at_k(correct: Tensor, k: int) -> Tensor:
    """Unbiased estimate per question that at least one of ``k`` fresh samples is right (arXiv 2107.03374, eq. 1).

    Args:
        correct: ``[Q, n]`` with ``n ≥ k`` samples per question; a partly right sample (say 0.5) counts as wrong.

    Returns:
        ``[Q]`` float64: ``1 − C(n−c, k) / C(n, k)`` for ``c`` right samples, as a product to avoid overflow.

    >>> pass_at_k(torch.tensor([[1, 0, 0, 0], [0, 0, 0, 0]]), k=2)
    tensor([0.5000, 0.0000], dtype=torch.float64)
    """
    n = correct.shape[1]
    if not 1 <= k <= n:
        raise ValueError(f"k must lie between 1 and the number of samples {n}, got {k}")
    wrong = (n - (correct >= 1).sum(dim=1)).double().unsqueeze(1)  # [Q, 1]
    draws = torch.arange(k, dtype=torch.float64, device=correct.device)  # [k]
    return 1.0 - ((wrong - draws) / (n - draws)).prod(dim=1)


def majority_at_k(votes: Tensor, correct: Tensor) -> Tensor:
    """Accuracy per question of the answer given most often (maj@k, arXiv 2203.11171).

    Args:
        votes: ``[Q, k]`` integers, equal for samples of a question with the same answer; negative for a sample without
            a readable answer, which does not vote.
        correct: ``[Q, k]`` accuracies; samples with the same answer count with their mean.

    Returns:
        ``[Q]`` float64: the mean over tied answers, of which one would be drawn; 0 for a question without votes.

    >>> majority_at_k(torch.tensor([[7, 7, 3, -1], [1, 2, -1, -1]]), torch.tensor([[1, 1, 0, 0], [1, 0, 0, 0]]))
    tensor([1.0000, 0.5000], dtype=torch.float64)
    """
    scores = []
    for row, right in zip(votes, correct.double(), strict=True):
        answers, index, counts = row.unique(return_inverse=True, return_counts=True)
        counts = torch.where(answers < 0, 0, counts)
        accuracy = torch.zeros(len(answers), dtype=torch.float64).scatter_reduce_(
            0, index.cpu(), right.cpu(), reduce="mean", include_self=False
        )
        winners = ((counts == counts.max()) & (counts > 0)).cpu()
        scores.append(accuracy[winners].mean() if bool(winners.any()) else accuracy.new_zeros(()))
    return torch.stack(scores) if scores else torch.zeros(0, dtype=torch.float64)


def bootstrap_interval(
    per_question: Tensor, *, level: float = 0.95, resamples: int = 2000, seed: int = 0
) -> tuple[float, float]:
    """Bootstrap interval of the mean over questions; see :func:`.resampling.bootstrap_interval`.

    Args:
        per_question: ``[Q]`` scores, e.g. from :func:`avg_at_k`, or differences of scores.
    """
    scores = per_question.detach().double().cpu().numpy()
    return resampling.bootstrap_interval(scores, level=level, resamples=resamples, seed=seed)


def sign_flip_p_value(differences: Tensor, *, resamples: int = 20_000, seed: int = 0) -> float:
    """Two-sided p-value of paired differences; see :func:`.resampling.sign_flip_p_value`.

    Args:
        differences: ``[Q]``, e.g. avg@k of one policy minus that of another, question by question.

    >>> sign_flip_p_value(torch.tensor([1.0, 1.0, 1.0, 0.0]))
    0.25
    """
    scores = differences.detach().double().cpu().numpy()
    return resampling.sign_flip_p_value(scores, resamples=resamples, seed=seed)
