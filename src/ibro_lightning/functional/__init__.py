"""The importable maths: torch only, tensors in, tensors out. For people with their own ``training_step``.

Conventions: ``B`` responses, ``T`` response tokens, ``V`` vocabulary, ``N`` valid tokens of a whole optimizer step;
``mask`` is 1 on response tokens (EOS included) and 0 on padding; log-probs and entropies are in nats.
"""

from ibro_lightning.functional.advantages import group_advantages
from ibro_lightning.functional.aggregate import masked_covariance, masked_mean, token_mean
from ibro_lightning.functional.evaluation import avg_at_k, bootstrap_interval, pass_at_k
from ibro_lightning.functional.logprobs import logprob_and_entropy
from ibro_lightning.functional.policy_loss import ClippedSurrogate, approximate_kl, clipped_surrogate
from ibro_lightning.functional.shaping import informative_groups, overlong_penalty

__all__ = [
    "ClippedSurrogate",
    "approximate_kl",
    "avg_at_k",
    "bootstrap_interval",
    "clipped_surrogate",
    "group_advantages",
    "informative_groups",
    "logprob_and_entropy",
    "masked_covariance",
    "masked_mean",
    "overlong_penalty",
    "pass_at_k",
    "token_mean",
]
