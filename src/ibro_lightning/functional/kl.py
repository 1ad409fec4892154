"""Estimates of the KL divergence from tokens that the policy sampled (J. Schulman, *Approximating KL Divergence*)."""

from __future__ import annotations

from typing import Literal, get_args

from torch import Tensor

KLEstimator = Literal["k1", "k2", "k3", "k3_k2_grad"]
"""An estimator of a KL divergence; see :func:`kl_divergence`."""


def kl_divergence(logp: Tensor, ref_logp: Tensor, estimator: KLEstimator = "k3") -> Tensor:
    """Per-token estimate of ``KL(π ‖ π_ref)`` in nats, for tokens sampled from ``π``.

    With ``r = π/π_ref`` and ``r' = 1/r``:

    ============== =================== =============== =======================================================
    estimator      value               as an estimate  expected gradient, when used as a loss on policy
    ============== =================== =============== =======================================================
    ``k1``         ``log r``           unbiased        0: use it inside a reward only
    ``k2``         ``½(log r)²``       biased          that of ``KL(π ‖ π_ref)``
    ``k3``         ``r' − 1 − log r'`` unbiased, ≥ 0   that of ``KL(π_ref ‖ π)``, the *other* direction
    ``k3_k2_grad`` that of k3          unbiased, ≥ 0   that of ``KL(π ‖ π_ref)``
    ============== =================== =============== =======================================================

    For a KL term in the loss, ``k2`` and ``k3_k2_grad`` are correct (arXiv 2510.01555); GRPO uses ``k3``. None of the
    gradients corrects for tokens from an older policy than ``π``.

    Args:
        logp: ``[B, T]`` log-probs under the current policy (gradient flows here); ``ref_logp``: under the reference.

    Returns:
        ``[B, T]``. ``log r`` is clamped to ±20, so that an impossible token cannot make it infinite; beyond that there
        is no gradient.
    """
    if estimator not in get_args(KLEstimator):
        raise ValueError(f"KL estimator must be one of {', '.join(get_args(KLEstimator))}; got {estimator!r}")
    log_ratio = (logp - ref_logp).clamp(-20.0, 20.0)
    if estimator == "k1":
        return log_ratio
    k2 = 0.5 * log_ratio**2
    if estimator == "k2":
        return k2
    k3 = (-log_ratio).expm1() + log_ratio  # exp(x) − 1 cancels for small x, and k3 could be negative
    return k3 if estimator == "k3" else k3.detach() + (k2 - k2.detach())


def approximate_kl(logp: Tensor, old_logp: Tensor) -> Tensor:
    """Per-token k3 estimate of ``KL(π_old ‖ π)`` in nats: ``r − 1 − log r``, never negative, low variance.

    Unbiased for tokens sampled from ``π_old``: :func:`kl_divergence` of that policy. ``[B, T]`` in and out.
    """
    return kl_divergence(old_logp, logp, "k3")
