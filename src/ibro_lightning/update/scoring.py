"""Scores a rollout by the policy (and a reference policy): log-probs, entropies, token rewards, without gradients."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from ibro_lightning.batches import Rollout
from ibro_lightning.batches.experience import Experience, OldScores
from ibro_lightning.batches.ragged import Places, per_token, put_tokens, row_sums
from ibro_lightning.batches.sequences import FlatSequences, Sequences
from ibro_lightning.errors import ConfigError, check_instance
from ibro_lightning.functional import HeadFunctional
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
from ibro_lightning.update.micro_batches import TokenBudget

OldLogp = Literal["policy", "sampler"]


class Scorer:
    """Runs networks over whole rollouts, in micro-batches.

    Args:
        loop: provides the ``policy`` and the ranks.
        loss: to be minimised. Its reference policy is run, too; if it corrects for the sampler, the sampler's log-probs
            are checked (:func:`.refuse_missing_logp`).
        budget: tokens in memory at once.
        overlong_filter: leave responses that were cut at the length limit out of the loss. Advantages still compare
            with them.
        old_logp: of the rows that are not in the rollout's first optimizer step, if that step scores its own:
            ``policy`` scores them before the update, ``sampler`` takes the log-probs that they were sampled with.
    """

    def __init__(
        self,
        loop: Loop,
        loss: PolicyLoss,
        budget: TokenBudget = TokenBudget(),
        *,
        overlong_filter: bool = False,
        old_logp: OldLogp = "policy",
    ) -> None:
        check_instance("overlong_filter", overlong_filter, bool)
        if old_logp not in get_args(OldLogp):
            raise ConfigError("old_logp", old_logp, "write policy or sampler")
        if old_logp == "sampler" and loss.sampler_correction is None:
            remedy = "sampler_correction checks these log-probs and weights the first step: set it, or write policy"
            raise ConfigError("old_logp", old_logp, remedy)
        self.loop, self.loss, self.budget, self.overlong_filter = loop, loss, budget, overlong_filter
        self.old_logp = old_logp
        self._warned_of_missing_logp = False

    @property
    def needs_scores(self) -> bool:
        """Whether the loss needs the policy's own scores of the whole rollout before the update begins."""
        unknown_entropies = self.old_logp == "sampler" and self.loss.regularizer.reads_old_entropy
        return self.loss.needs_scores or unknown_entropies

    def __call__(self, rollout: Rollout, *, first_step: Tensor | None = None) -> Experience:
        """The rollout as the policy sees it before the update; advantages are still 0. ``mask`` leaves out late
        responses, and tokens without a finite sampler log-prob; rewards remain those of the whole response.

        Args:
            first_step: the groups of the rollout's first optimizer step, which is left to score its own rows
                (:meth:`.Updater.first_step`); None: all rows are scored now.

        Raises:
            ConfigError: the sampler's log-probs leave nothing to correct by.
        """
        sequences, lengths = rollout.sequences, rollout.sequences.response_lengths
        logp, entropy, extra = self._scores(rollout, first_step)  # [N]
        has_tokens = lengths > 0  # [B]; an engine's deadline may leave a response empty
        rewards = self._zeros(sequences)  # [N]
        rewards[lengths.cumsum(0)[has_tokens] - 1] = rollout.rewards[has_tokens].to(rewards.dtype)
        if (kl := self.loss.kl) is not None:
            rewards = kl.take_from(rewards, extra["reference_kl"])
        counts = sampled_tokens(rollout.sampler_logp, per_token(~rollout.late, lengths), self.loop.ranks)  # [N]
        experience = Experience(
            sequences=sequences,
            old_logp=logp,
            old_entropy=entropy,
            advantages=rewards.new_zeros(()).expand_as(rewards),  # takes no memory
            mask=counts & per_token(~rollout.truncated, lengths) if self.overlong_filter else counts,
            groups=rollout.groups,
            temperature=rollout.temperature,
            iteration=rollout.iteration,
            prompts=rollout.prompts,
            token_rewards=rewards,
            rewards=torch.where(has_tokens, row_sums(rewards, lengths), rollout.rewards.to(rewards.dtype)),
            sampler_logp=rollout.sampler_logp,
            outcomes=rollout.outcomes,
            outcome_span=rollout.outcome_span,
            num_groups=rollout.num_groups,
            placeholder=rollout.placeholder,
            other_rows=None if first_step is None else self._other_rows(rollout, first_step),
            extra=extra,
        )
        if self.loss.sampler_correction is not None:
            self._check_sampler_logp(rollout, experience)
        return experience

    def _scores(
        self, rollout: Rollout, first_step: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None, dict[str, Tensor]]:
        """``(old logp, old entropy, extra)``, ``[N]`` each; ``extra`` compares with a reference policy, if there is
        one."""
        sequences, temperature, kl = rollout.sequences, rollout.temperature, self.loss.kl
        if first_step is not None:
            assert kl is None, "a penalty to a reference needs scores first"
            return None, None, {}
        if kl is None:
            return *self.score(sequences, temperature), {}
        if kl.estimator == "exact":
            logp, entropy, values = self._pass(
                sequences, temperature, lambda micro: {"kl": kl.functional(micro, temperature)}
            )
            return logp, entropy, {"reference_kl": values["kl"]}
        logp, entropy = self.score(sequences, temperature)
        reference_logp, _ = self.score(sequences, temperature, kl.on(sequences.device), with_entropy=False)
        return logp, entropy, {"reference_logp": reference_logp, "reference_kl": kl.penalty(logp, reference_logp)}

    @torch.no_grad()
    def score(
        self, sequences: FlatSequences, temperature: float, policy: nn.Module | None = None, with_entropy: bool = True
    ) -> tuple[Tensor, Tensor]:
        """``(logp, entropy)`` ``[N]`` under the present policy (or another one), without gradients; the entropy
        is 0 without ``with_entropy``."""
        logp, entropy, _ = self._pass(sequences, temperature, policy=policy, with_entropy=with_entropy)
        return logp, entropy

    @torch.no_grad()
    def tell(
        self, sequences: FlatSequences, temperature: float, functionals: Mapping[str, HeadFunctional]
    ) -> dict[str, Tensor]:
        """What functionals of the head give for each response token under the present policy, ``{name: [N]}``, without
        gradients."""
        return self._pass(sequences, temperature, lambda _: functionals, with_entropy=False)[2]

    @torch.no_grad()
    def _pass(
        self,
        sequences: FlatSequences,
        temperature: float,
        functionals_of: Callable[[Sequences], Mapping[str, HeadFunctional]] | None = None,
        *,
        policy: nn.Module | None = None,
        with_entropy: bool = True,
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """``(logp, entropy, {name: value})``, ``[N]`` each, in micro-batches.

        Args:
            functionals_of: the head's functionals for a padded micro-batch.
        """
        policy = policy or self.policy
        logp, entropy = self._zeros(sequences), self._zeros(sequences)
        values: dict[str, Tensor] = {}
        for rows, _ in self.budget.micro_batches(sequences, self.loop.ranks, policy):
            of_micro: Mapping[str, Tensor] = {}
            with self.budget.advice("prepare", micro := sequences.pad(rows), policy):
                options: dict[str, Any] = {"temperature": temperature, "with_entropy": with_entropy}
                if functionals_of is None:  # users' policies need not accept functionals
                    micro_logp, micro_entropy = policy(micro, **options)  # [b, t]
                else:
                    functionals = functionals_of(micro)
                    micro_logp, micro_entropy, of_micro = policy(micro, functionals=functionals, **options)
            places = Places.of(sequences.response_lengths, rows)
            places.put(micro_logp, logp)
            if micro_entropy is not None:
                places.put(micro_entropy, entropy)
            for name, padded in of_micro.items():
                if name not in values:
                    values[name] = self._zeros(sequences)
                places.put(padded, values[name])
        return logp, entropy, values

    @torch.no_grad()
    def values(self, critic: Critic, sequences: FlatSequences) -> tuple[Tensor, Tensor]:
        """A critic's values before each response token ``[N]``, and after the last of each response ``[B]``, without
        gradients."""
        values = self._zeros(sequences)
        last_values = values.new_zeros(len(sequences))
        for rows, _ in self.budget.micro_batches(sequences, self.loop.ranks, critic):
            with self.budget.advice("prepare", micro := sequences.pad(rows), critic):
                micro_values = critic(micro)  # [b, t + 1]
            Places.of(sequences.response_lengths, rows).put(micro_values[:, :-1], values)
            last_values[rows] = micro_values.gather(1, micro.response_lengths[:, None]).squeeze(1).to(values.dtype)
        return values, last_values

    def context(self, tokenizer: Any = None, max_length: int | None = None) -> StepContext:
        """The context of losses and regularisers, with the present policy."""
        ranks = self.loop.ranks
        return StepContext(self.policy, self.score, tokenizer, max_length=max_length, ranks=ranks, tell=self.tell)

    @property
    def policy(self) -> nn.Module:
        return self.loop.networks["policy"]

    @property
    def _dtype(self) -> torch.dtype:
        """Of scores: float32, or float64 for float64 weights."""
        return torch.float64 if next(self.policy.parameters()).dtype == torch.float64 else torch.float32

    def _zeros(self, sequences: FlatSequences) -> Tensor:
        """``[N]`` for scores."""
        return torch.zeros(sequences.responses.shape, dtype=self._dtype, device=sequences.device)

    def _other_rows(self, rollout: Rollout, first_step: Tensor) -> OldScores | None:
        """The old scores of the rows that are not in the first optimizer step; None if it has all groups."""
        if len(first_step) >= rollout.num_groups:
            return None
        sequences, sampler_logp = rollout.sequences, rollout.sampler_logp
        scores = OldScores.unknown(sequences, self._dtype)  # [N]
        others = torch.isin(rollout.groups, first_step.to(rollout.groups.device), invert=True)  # [B]
        rows, lengths = others.nonzero().squeeze(-1), sequences.response_lengths
        if self.old_logp == "sampler":
            # A token without a finite one takes no part in the loss; 0 keeps its nan out of the gradient.
            finite = torch.where(sampler_logp.isfinite(), sampler_logp, 0.0).to(scores.logp)  # [N]
            return replace(scores, logp=torch.where(per_token(others, lengths), finite, scores.logp))
        # All ranks take part in the forward passes of a sharded policy; one without others scores an unused row.
        part = sequences.select(rows if len(rows) else rows.new_zeros(1))
        computed = self.score(part, rollout.temperature)  # [n] each
        if len(rows):
            for own, values in zip(computed, (scores.logp, scores.entropy), strict=True):
                put_tokens(own, values, lengths, rows)
            scores.scored[rows] = True
        return scores

    def _check_sampler_logp(self, rollout: Rollout, experience: Experience) -> None:
        """Raise :class:`ConfigError` if there is nothing to correct by; warn once of responses left out."""
        ranks, lengths = self.loop.ranks, experience.lengths
        tokens = experience.responses & experience.per_token(~rollout.late)  # [N]
        refuse_impossible_logp(rollout.sampler_logp, tokens, ranks)
        suspicious = logp_are_suspicious(rollout.sampler_logp, tokens, lengths).to(torch.float32)
        old_logp = experience.old_logp
        if old_logp is None:
            if not bool(ranks.max(suspicious)):
                return
            old_logp, _ = self.score(experience.sequences, rollout.temperature, with_entropy=False)
        missing = refuse_missing_logp(rollout.sampler_logp, old_logp, tokens, lengths, ranks)
        if missing and not self._warned_of_missing_logp:
            self._warned_of_missing_logp = True
            rank_zero_warn(
                f"iteration {rollout.iteration}: {missing} responses have no sampler log-probs and are left out of the "
                "loss (sampler/non_finite counts their tokens; warned of once)"
            )
