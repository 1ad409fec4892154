"""Scores a rollout by the policy (and a reference policy): log-probs, entropies, token rewards, without gradients."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ibro_lightning.batches import Rollout
from ibro_lightning.batches.experience import Experience
from ibro_lightning.batches.sequences import Sequences
from ibro_lightning.models import Critic
from ibro_lightning.ranks import rank_zero_warn
from ibro_lightning.regularizers import StepContext
from ibro_lightning.update.correction import (
    logp_are_suspicious,
    refuse_impossible_logp,
    refuse_missing_logp,
    sampled_tokens,
)
from ibro_lightning.update.loop import Loop
from ibro_lightning.update.loss import PolicyLoss
from ibro_lightning.update.steps import TokenBudget


class Scorer:
    """Runs networks over whole rollouts, in micro-batches.

    Args:
        loop: provides the ``policy`` and the ranks.
        loss: to be minimised. Its reference policy is run, too; if it corrects for the sampler, the sampler's log-probs
            are checked (:func:`.refuse_missing_logp`).
        budget: tokens in memory at once.
        overlong_filter: leave responses that were cut at the length limit out of the loss. Advantages still compare
            with them.
    """

    def __init__(
        self, loop: Loop, loss: PolicyLoss, budget: TokenBudget = TokenBudget(), *, overlong_filter: bool = False
    ) -> None:
        self.loop, self.loss, self.budget, self.overlong_filter = loop, loss, budget, overlong_filter
        self._warned_of_missing_logp = False

    def __call__(self, rollout: Rollout, *, scores_first: bool = True) -> Experience:
        """The rollout as the policy sees it before the update; advantages are still 0. ``mask`` leaves out late
        responses, and tokens without a finite sampler log-prob; rewards remain those of the whole response.

        Args:
            scores_first: compute the old log-probs and entropies; otherwise a single optimizer step has to.

        Raises:
            ConfigError: the sampler's log-probs leave nothing to correct by.
        """
        sequences, responses = rollout.sequences, rollout.sequences.response_mask
        logp, entropy = self.score(sequences, rollout.temperature) if scores_first else (None, None)  # [B, T]
        extra = {}
        rewards = self._zeros(sequences)  # [B, T]
        last = (sequences.response_lengths - 1).clamp(min=0)  # [B]; an engine's deadline may leave a response empty
        rewards.scatter_(1, last[:, None], rollout.rewards[:, None].to(rewards.dtype))
        if (kl := self.loss.kl) is not None:
            assert logp is not None, "a penalty to a reference needs scores first"
            reference = kl.on(sequences.input_ids.device)
            reference_logp, _ = self.score(sequences, rollout.temperature, reference, with_entropy=False)
            extra = {"reference_logp": reference_logp, "reference_kl": kl.penalty(logp, reference_logp)}
            rewards = kl.take_from(rewards, extra["reference_kl"])
        on_time = responses & ~rollout.late[:, None]  # [B, T]
        counts = sampled_tokens(rollout.sampler_logp, on_time, self.loop.ranks)
        experience = Experience(
            sequences=sequences,
            old_logp=logp,
            old_entropy=entropy,
            advantages=torch.zeros_like(rewards),
            mask=counts & ~rollout.truncated[:, None] if self.overlong_filter else counts,
            groups=rollout.groups,
            temperature=rollout.temperature,
            iteration=rollout.iteration,
            prompts=rollout.prompts,
            token_rewards=rewards,
            sampler_logp=rollout.sampler_logp,
            outcomes=rollout.outcomes,
            outcome_span=rollout.outcome_span,
            num_groups=rollout.num_groups,
            placeholder=rollout.placeholder,
            extra=extra,
        )
        if self.loss.sampler_correction is not None:
            self._check_sampler_logp(rollout, experience)
        return experience

    def complete(self, experience: Experience, step: Experience) -> Experience:
        """Add the old log-probs and entropies that a rollout's only optimizer step took from its own forward pass. If
        that step was skipped, the policy has not moved and is scored now."""
        if experience.old_logp is not None:
            return experience
        scores = (step.old_logp, step.old_entropy)
        if step.old_logp is None:
            scores = self.score(experience.sequences, experience.temperature)
        return replace(experience, old_logp=scores[0], old_entropy=scores[1])

    @torch.no_grad()
    def score(
        self, sequences: Sequences, temperature: float, policy: nn.Module | None = None, with_entropy: bool = True
    ) -> tuple[Tensor, Tensor]:
        """``(logp, entropy)`` ``[B, T]`` under the present policy (or another one), without gradients; the entropy
        is 0 without ``with_entropy``."""
        policy = policy or self.policy
        logp, entropy = self._zeros(sequences), self._zeros(sequences)
        for rows, _ in self.budget.micro_batches(sequences, self.loop.ranks, policy):
            with self.budget.advice("prepare", micro := sequences.select(rows), policy):
                micro_logp, micro_entropy = policy(micro, temperature=temperature, with_entropy=with_entropy)  # [b, t]
            width = micro_logp.shape[1]
            logp[rows, :width] = micro_logp
            if micro_entropy is not None:
                entropy[rows, :width] = micro_entropy
        return logp, entropy

    @torch.no_grad()
    def values(self, critic: Critic, sequences: Sequences) -> Tensor:
        """``[B, T + 1]`` a critic's values before each response token and after the last, without gradients."""
        values = torch.nn.functional.pad(self._zeros(sequences), (0, 1))
        for rows, _ in self.budget.micro_batches(sequences, self.loop.ranks, critic):
            with self.budget.advice("prepare", micro := sequences.select(rows), critic):
                micro_values = critic(micro)  # [b, t + 1]
            values[rows, : micro_values.shape[1]] = micro_values
        return values

    def context(self, tokenizer: Any = None, max_length: int | None = None) -> StepContext:
        """The context of losses and regularisers, with the present policy."""
        return StepContext(self.policy, self.score, tokenizer, max_length=max_length, ranks=self.loop.ranks)

    @property
    def policy(self) -> nn.Module:
        return self.loop.networks["policy"]

    def _zeros(self, sequences: Sequences) -> Tensor:
        """``[B, T]`` for scores: float32, or float64 for float64 weights."""
        dtype = torch.float64 if next(self.policy.parameters()).dtype == torch.float64 else torch.float32
        return torch.zeros(sequences.response_mask.shape, dtype=dtype, device=sequences.input_ids.device)

    def _check_sampler_logp(self, rollout: Rollout, experience: Experience) -> None:
        """Raise :class:`ConfigError` if there is nothing to correct by; warn once of responses left out."""
        ranks, tokens = self.loop.ranks, experience.responses & ~rollout.late[:, None]  # [B, T]
        refuse_impossible_logp(rollout.sampler_logp, tokens, ranks)
        suspicious = logp_are_suspicious(rollout.sampler_logp, tokens).to(torch.float32)
        old_logp = experience.old_logp
        if old_logp is None:
            if not bool(ranks.max(suspicious)):
                return
            old_logp, _ = self.score(experience.sequences, rollout.temperature, with_entropy=False)
        missing = refuse_missing_logp(rollout.sampler_logp, old_logp, tokens, ranks)
        if missing and not self._warned_of_missing_logp:
            self._warned_of_missing_logp = True
            rank_zero_warn(
                f"iteration {rollout.iteration}: {missing} responses have no sampler log-probs and are left out of the "
                "loss (sampler/non_finite counts their tokens; warned of once)"
            )
