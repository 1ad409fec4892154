"""A KL penalty to a frozen reference policy: in the reward or in the loss, with a fixed or adaptive coefficient."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from ibro_lightning.batches.experience import TokenStats
from ibro_lightning.batches.sequences import Sequences
from ibro_lightning.errors import ConfigError, check_one_of
from ibro_lightning.functional import HeadFunctional, kl_divergence
from ibro_lightning.models import (
    Policy,
    PolicyLike,
    PolicyOptions,
    PolicySource,
    Sharding,
    as_source,
    build_policy,
    check_same_vocabulary,
)
from ibro_lightning.regularizers.coefficients import Coefficient, as_coefficient

Placement = Literal["loss", "reward"]
ReferenceEstimator = Literal["k1", "k2", "k3", "k3_k2_grad", "exact"]
EXACT = "exact_reference_kl"
"""The functional of the policy's head that ``estimator: exact`` adds to the update's forward pass."""


class ReferenceKL:
    """``KL(π ‖ π_ref)`` per token, estimated from the sampled tokens or computed exactly.

    Args:
        coef: β, or :class:`~ibro_lightning.regularizers.coefficients.AdaptiveKL`, with its state in the checkpoint.
        placement: ``loss`` adds ``β·agg(KL)``; ``reward`` takes ``β·KL_t`` off each token's reward, before advantages.
        estimator: ``k1`` = log r, ``k2`` = ½(log r)², ``k3``, or ``k3_k2_grad``: k3's value with k2's gradient, which
            is that of the KL. In the loss, the gradient of k1 is 0 on average, so it is refused. ``exact`` is the sum
            over the whole vocabulary in place of the sampled token alone, in chunks: value and gradient have no
            sampling noise. In the loss it takes a forward pass of the reference with every pass of the update, too.
        policy: folder, hub name or model of the reference; None takes the policy as it is before training.
    """

    def __init__(
        self,
        coef: Coefficient | float = 0.001,
        placement: Placement = "loss",
        estimator: ReferenceEstimator = "k3_k2_grad",
        policy: PolicyLike | None = None,
    ) -> None:
        self.coefficient = as_coefficient(coef, "coef", "KL")
        if placement not in get_args(Placement):
            raise ConfigError("placement", placement, "write loss or reward")
        check_one_of("estimator", estimator, get_args(ReferenceEstimator))
        if placement == "loss" and estimator == "k1":
            raise ConfigError("estimator", "k1", "its gradient is 0 on average: write k2, k3, k3_k2_grad or exact")
        self.placement, self.estimator, self.policy = placement, estimator, policy
        self.sharding: Sharding | None = None
        """How the reference is sharded, like the policy; set before its first use."""
        self._options = PolicyOptions()
        self._source: PolicySource | None = None
        self._reference: Policy | None = None

    @property
    def coef(self) -> float:
        """The present β."""
        return self.coefficient.value

    def setup(self, policy: PolicySource, options: PolicyOptions) -> None:
        """Resolve the reference; it is loaded on first use, and kept."""
        self._options = options
        self._source = policy
        if self.policy is not None:
            self._source = as_source(self.policy, options, "policy")
            check_same_vocabulary(policy, self._source, "policy")

    @property
    def source(self) -> PolicySource:
        if self._source is None:
            raise RuntimeError("call ReferenceKL.setup(policy_source, options) before the first update: our modules do")
        return self._source

    def on(self, device: torch.device) -> Policy:
        """The reference policy, on ``device`` or sharded. It is no submodule: not trained, checkpointed or synced."""
        if self._reference is None:
            self._reference = build_policy(self.source, self._options, self.sharding, frozen=True)
        return self._reference if self.sharding else self._reference.to(device)

    def functional(self, sequences: Sequences, temperature: float) -> HeadFunctional:
        """For a pass of the policy over ``sequences``: the exact KL at each response token. Runs the reference."""
        reference = self.on(sequences.input_ids.device)
        return reference.kl_to(sequences, temperature=temperature, reverse=True)

    def functionals(self, sequences: Sequences, temperature: float) -> dict[str, HeadFunctional]:
        """What an update's pass of the policy computes for the loss: :meth:`functional`, if the loss needs it."""
        if self.estimator != "exact" or self.placement != "loss":
            return {}
        return {EXACT: self.functional(sequences, temperature)}

    def penalty(self, logp: Tensor, reference_logp: Tensor) -> Tensor:
        """The estimate per token, in nats; with a gradient if ``logp`` has one."""
        assert self.estimator != "exact", "it needs more than the log-probs of the sampled tokens"
        return kl_divergence(logp, reference_logp, self.estimator)

    def take_from(self, rewards: Tensor, kl: Tensor) -> Tensor:
        """Token rewards ``[N]``, less the penalty if it is placed there."""
        return rewards - self.coef * kl if self.placement == "reward" else rewards

    def add_to(self, loss: Tensor, stats: TokenStats) -> Tensor:
        """Token losses ``[B, T]``, plus the penalty if it is placed there."""
        if self.placement != "loss":
            return loss
        exact = self.estimator == "exact"
        kl = stats.extra[EXACT] if exact else self.penalty(stats.logp, stats.extra["reference_logp"])
        return loss + self.coef * kl
