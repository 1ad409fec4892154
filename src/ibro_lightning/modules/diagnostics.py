"""What one looks at to understand an update: entropy, advantages and how the two go together."""

from __future__ import annotations

from torch import Tensor

from ibro_lightning.experience import Experience
from ibro_lightning.functional import masked_covariance, masked_mean
from ibro_lightning.modules.correction import SamplerCorrection, mismatch_metrics
from ibro_lightning.types import Rollout


def experience_metrics(
    experience: Experience, rollout: Rollout, correction: SamplerCorrection | None = None
) -> dict[str, float]:
    """Statistics of the policy that the rollout came from, over its valid tokens.

    ``ib/mean_product`` is ``mean(A·H)``, the IB objective; it is the sum of a uniform part ``Ā·H̄`` and of
    ``Cov(A, H)``. All three are reported for every regulariser, none included.
    """
    advantages, entropy, mask = experience.advantages, experience.old_entropy, experience.mask
    responses = experience.sequences.response_mask
    mean_advantage, mean_entropy = masked_mean(advantages, mask), masked_mean(entropy, mask)
    covariance = masked_covariance(advantages, entropy, mask)
    mismatch = (experience.old_logp - rollout.sampler_logp).abs()
    metrics = {
        "policy/entropy": masked_mean(entropy, responses),
        "policy/entropy_first_token": masked_mean(entropy[:, :1], responses[:, :1]),
        "policy/logp": masked_mean(experience.old_logp, responses),
        "advantage/mean": mean_advantage,
        "advantage/std": masked_covariance(advantages, advantages, mask).sqrt(),
        "advantage/max": _largest(advantages, mask),
        "advantage/min": -_largest(-advantages, mask),
        "ib/cov_advantage_entropy": covariance,
        "ib/mean_advantage_times_mean_entropy": mean_advantage * mean_entropy,
        "ib/mean_product": covariance + mean_advantage * mean_entropy,
        "sampler/logp_difference_mean": masked_mean(mismatch, responses),
        "sampler/logp_difference_max": _largest(mismatch, responses),
        **mismatch_metrics(correction, experience.old_logp, rollout.sampler_logp, responses),
    }
    if "reference_kl" in experience.extra:
        metrics["kl/reference"] = masked_mean(experience.extra["reference_kl"], responses)
    return {name: value.item() for name, value in metrics.items()}


def _largest(values: Tensor, mask: Tensor) -> Tensor:
    return values[mask].max() if mask.any() else values.new_zeros(())
