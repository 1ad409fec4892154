"""What one looks at to understand an update: entropy, advantages and how the two go together."""

from __future__ import annotations

import torch
from torch import Tensor

from ibro_lightning.experience import Experience
from ibro_lightning.functional import masked_covariance
from ibro_lightning.modules.correction import SamplerCorrection, mismatch_metrics
from ibro_lightning.ranks import ALONE, Ranks
from ibro_lightning.types import Rollout


def experience_metrics(
    experience: Experience, rollout: Rollout, correction: SamplerCorrection | None = None, ranks: Ranks = ALONE
) -> dict[str, float]:
    """Statistics of the policy that the rollout came from, over its valid tokens on all ranks.

    ``ib/mean_product`` is ``mean(A·H)``, the IB objective; it is the sum of a uniform part ``Ā·H̄`` and of
    ``Cov(A, H)``. All three are reported for every regulariser, none included.
    """
    advantages, entropy, mask = experience.advantages, experience.old_entropy, experience.mask
    responses, mean = experience.responses, ranks.mean
    mean_advantage, mean_entropy = mean(advantages, mask), mean(entropy, mask)
    covariance = masked_covariance(advantages, entropy, mask, mean=mean)
    mismatch = (experience.old_logp - rollout.sampler_logp).abs()
    metrics = {
        "policy/entropy": mean(entropy, responses),
        "policy/entropy_first_token": mean(entropy[:, :1], responses[:, :1]),
        "policy/logp": mean(experience.old_logp, responses),
        "advantage/mean": mean_advantage,
        "advantage/std": masked_covariance(advantages, advantages, mask, mean=mean).sqrt(),
        "advantage/max": _or_zero(ranks.largest(advantages, mask)),
        "advantage/min": -_or_zero(ranks.largest(-advantages, mask)),
        "ib/cov_advantage_entropy": covariance,
        "ib/mean_advantage_times_mean_entropy": mean_advantage * mean_entropy,
        "ib/mean_product": covariance + mean_advantage * mean_entropy,
        "sampler/logp_difference_mean": mean(mismatch, responses),
        "sampler/logp_difference_max": _or_zero(ranks.largest(mismatch, responses)),
        **mismatch_metrics(correction, experience.old_logp, rollout.sampler_logp, responses, ranks),
    }
    if "reference_kl" in experience.extra:
        metrics["kl/reference"] = mean(experience.extra["reference_kl"], responses)
    return {name: value.item() for name, value in metrics.items()}


def _or_zero(largest: Tensor) -> Tensor:
    """The largest of nothing is −∞, which no curve can show."""
    return largest.new_zeros(()) if largest == -torch.inf else largest
