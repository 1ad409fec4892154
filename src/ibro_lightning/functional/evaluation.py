"""Accuracy over ``k`` samples per question, and how sure one can be of it."""

from __future__ import annotations

import torch
from torch import Tensor


def avg_at_k(correct: Tensor) -> Tensor:
    """Mean accuracy per question: ``[Q, k]`` (1 right, 0 wrong) → ``[Q]``. The mean over questions is avg@k."""
    return correct.double().mean(dim=1)


def pass_at_k(correct: Tensor, k: int) -> Tensor:
    """Unbiased estimate per question that at least one of ``k`` fresh samples is right (arXiv 2107.03374, eq. 1).

    Args:
        correct: ``[Q, n]`` with ``n ≥ k`` samples per question; a partly right sample (say 0.5) counts as wrong.

    Returns:
        ``[Q]`` float64: ``1 − C(n−c, k) / C(n, k)`` for ``c`` right ones, as a product so that nothing overflows.

    >>> pass_at_k(torch.tensor([[1, 0, 0, 0], [0, 0, 0, 0]]), k=2)
    tensor([0.5000, 0.0000], dtype=torch.float64)
    """
    n = correct.shape[1]
    if not 1 <= k <= n:
        raise ValueError(f"k must lie between 1 and the number of samples {n}, got {k}")
    wrong = (n - (correct >= 1).sum(dim=1)).double().unsqueeze(1)
    draws = torch.arange(k, dtype=torch.float64, device=correct.device)
    return 1.0 - ((wrong - draws) / (n - draws)).prod(dim=1)


def bootstrap_interval(
    per_question: Tensor, *, level: float = 0.95, resamples: int = 2000, seed: int = 0
) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean, resampling *questions* (samples of one question are not independent).

    Args:
        per_question: ``[Q]`` scores, e.g. from :func:`avg_at_k`.

    Returns:
        ``(low, high)``; both NaN for Q = 0.
    """
    if per_question.numel() == 0:
        return float("nan"), float("nan")
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randint(per_question.numel(), (resamples, per_question.numel()), generator=generator)
    means = per_question.double().cpu()[rows].mean(dim=1)
    tail = (1.0 - level) / 2.0
    low, high = torch.quantile(means, torch.tensor([tail, 1.0 - tail], dtype=torch.float64)).tolist()
    return low, high
