"""The importable maths: torch only, tensors in, tensors out. For people with their own ``training_step``.

Conventions: ``B`` responses, ``T`` response tokens, ``V`` vocabulary, ``N`` valid tokens of a whole optimizer step;
``mask`` is 1 on response tokens (EOS included) and 0 on padding; log-probs and entropies are in nats.
"""

from ibro_lightning.functional.accuracy import avg_at_k, bootstrap_interval, majority_at_k, pass_at_k, sign_flip_p_value
from ibro_lightning.functional.advantages import (
    GAE,
    dr_grpo_advantages,
    gae,
    group_advantages,
    length_adaptive_lambda,
    reinforce_plus_plus_advantages,
    reward_to_go,
    rloo_advantages,
)
from ibro_lightning.functional.aggregate import (
    AggregationMode,
    aggregate,
    aggregation_weights,
    explained_variance,
    masked_covariance,
    masked_max,
    masked_mean,
    masked_whiten,
    token_mean,
)
from ibro_lightning.functional.fused_head import linear_head, linear_logprob_entropy
from ibro_lightning.functional.head_functionals import (
    Collision,
    HeadFunctional,
    Margin,
    RestrictedEntropy,
    TokenProbability,
)
from ibro_lightning.functional.information import (
    PlanePoint,
    ending_rates,
    information_plane,
    masked_correlation,
    quarter,
)
from ibro_lightning.functional.kl import KLEstimator, approximate_kl, kl_divergence
from ibro_lightning.functional.kl_functionals import KLToHead, KLToLogits
from ibro_lightning.functional.logprobs import logprob_and_entropy
from ibro_lightning.functional.mismatch import (
    MismatchLevel,
    MismatchMode,
    MismatchWeights,
    mismatch_diagnostics,
    mismatch_weights,
    mismatched_rows,
)
from ibro_lightning.functional.pass_rate_advantages import (
    asym_grpo_advantages,
    maxrl_advantages,
    quantile_advantages,
)
from ibro_lightning.functional.policy_loss import (
    ClippedSurrogate,
    SoftSurrogate,
    cispo_surrogate,
    clipped_surrogate,
    dppo_surrogate,
    gmpo_surrogate,
    gspo_surrogate,
    sapo_surrogate,
)
from ibro_lightning.functional.regularization import information_bottleneck_objective
from ibro_lightning.functional.shaping import informative_groups, overlong_penalty
from ibro_lightning.functional.value_loss import ClippedValueLoss, clipped_value_loss

__all__ = [
    "GAE",
    "AggregationMode",
    "ClippedSurrogate",
    "ClippedValueLoss",
    "Collision",
    "HeadFunctional",
    "KLEstimator",
    "KLToHead",
    "KLToLogits",
    "Margin",
    "MismatchLevel",
    "MismatchMode",
    "MismatchWeights",
    "PlanePoint",
    "RestrictedEntropy",
    "SoftSurrogate",
    "TokenProbability",
    "aggregate",
    "aggregation_weights",
    "approximate_kl",
    "asym_grpo_advantages",
    "avg_at_k",
    "bootstrap_interval",
    "cispo_surrogate",
    "clipped_surrogate",
    "clipped_value_loss",
    "dppo_surrogate",
    "dr_grpo_advantages",
    "ending_rates",
    "explained_variance",
    "gae",
    "gmpo_surrogate",
    "group_advantages",
    "gspo_surrogate",
    "information_bottleneck_objective",
    "information_plane",
    "informative_groups",
    "kl_divergence",
    "length_adaptive_lambda",
    "linear_head",
    "linear_logprob_entropy",
    "logprob_and_entropy",
    "majority_at_k",
    "masked_correlation",
    "masked_covariance",
    "masked_max",
    "masked_mean",
    "masked_whiten",
    "maxrl_advantages",
    "mismatch_diagnostics",
    "mismatch_weights",
    "mismatched_rows",
    "overlong_penalty",
    "pass_at_k",
    "quantile_advantages",
    "quarter",
    "reinforce_plus_plus_advantages",
    "reward_to_go",
    "rloo_advantages",
    "sapo_surrogate",
    "sign_flip_p_value",
    "token_mean",
]
