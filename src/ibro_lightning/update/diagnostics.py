"""Diagnostics of an update: entropy, advantages, and how the two covary."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from ibro_lightning.batches import Rollout
from ibro_lightning.batches.experience import Experience
from ibro_lightning.functional import masked_covariance
from ibro_lightning.ranks import ALONE, Ranks
from ibro_lightning.regularizers.coefficients import Coefficient
from ibro_lightning.update.correction import mismatch_metrics
from ibro_lightning.update.loss import PolicyLoss


def experience_metrics(
    experience: Experience, rollout: Rollout, loss: PolicyLoss | None = None, ranks: Ranks = ALONE
) -> dict[str, float]:
    """Statistics of the policy that the rollout came from, over its valid tokens on all ranks, and the coefficients of
    ``loss``. Those of log-probs and entropies are over the rows that the policy has scored (``experience.scored``):
    whole groups that were chosen at random.

    ``ib/mean_product`` is ``mean(A·H)``, the IB objective; it is the sum of a uniform part ``Ā·H̄`` and of
    ``Cov(A, H)``. All three are reported with any regulariser, or none.
    """
    assert experience.old_logp is not None
    assert experience.old_entropy is not None
    advantages, entropy, mask = experience.advantages, experience.old_entropy, experience.mask
    responses, mean = experience.scored_responses, ranks.mean
    correction = None if loss is None else loss.sampler_correction
    scored = mask & responses  # [N] of those that take part in the loss
    mean_advantage, mean_entropy = mean(advantages, scored), mean(entropy, scored)
    covariance = masked_covariance(advantages, entropy, scored, mean=mean)
    mismatch = (experience.old_logp - rollout.sampler_logp).abs()  # [N]
    compared = responses & mismatch.isfinite()  # [N]
    non_finite = experience.responses & ~mismatch.isfinite()  # [N]
    lengths = experience.lengths
    first = (lengths.cumsum(0) - lengths)[lengths > 0]  # [≤ B] places of the first tokens
    metrics = {
        "policy/entropy": mean(entropy, responses),
        "policy/entropy_first_token": mean(entropy[first], responses[first]),
        "policy/logp": mean(experience.old_logp, responses),
        "advantage/mean": mean(advantages, mask),
        "advantage/std": masked_covariance(advantages, advantages, mask, mean=mean).sqrt(),
        "advantage/max": _or_zero(ranks.largest(advantages, mask)),
        "advantage/min": -_or_zero(ranks.largest(-advantages, mask)),
        "ib/cov_advantage_entropy": covariance,
        "ib/mean_advantage_times_mean_entropy": mean_advantage * mean_entropy,
        "ib/mean_product": covariance + mean_advantage * mean_entropy,
        "sampler/logp_difference_mean": mean(mismatch, compared),
        "sampler/logp_difference_max": _or_zero(ranks.largest(mismatch, compared)),
        **mismatch_metrics(correction, experience.old_logp, rollout.sampler_logp, responses, lengths, ranks),
        "sampler/non_finite": ranks.sum(non_finite.sum().to(mismatch.dtype)),
    }
    if "reference_kl" in experience.extra:
        metrics["kl/reference"] = mean(experience.extra["reference_kl"], responses)
    coefficients = {} if loss is None else loss.coefficients
    return {
        **{name: value.item() for name, value in metrics.items()},
        **{name if "/" in name else f"{name}/coef": c.value for name, c in coefficients.items()},
    }


def observe(coefficients: Iterable[Coefficient], measured: Tensor | None, experience: Experience, ranks: Ranks) -> None:
    """Pass coefficients the mean of ``measured`` ``[N]`` over the rollout's response tokens on all ranks; None: it
    is not measured yet, which suits coefficients that follow nothing."""
    if measured is None:
        return
    mean = ranks.mean(measured, experience.responses).item()
    count = 0 if experience.placeholder else len(experience)
    samples = int(ranks.sum(torch.tensor(count, device=measured.device)))
    for coefficient in coefficients:
        coefficient.observe(mean, samples)


def _or_zero(largest: Tensor) -> Tensor:
    """0 in place of −∞, the largest of no values, which a curve cannot show."""
    return largest.new_zeros(()) if largest == -torch.inf else largest
