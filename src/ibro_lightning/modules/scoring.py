"""A rollout as the policy (and a reference policy) sees it: log-probs, entropies, token rewards, without gradients."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ibro_lightning.coefficients import Coefficient
from ibro_lightning.errors import check_at_least
from ibro_lightning.experience import Experience, StepContext
from ibro_lightning.functional import masked_whiten
from ibro_lightning.guards.memory_advice import memory_advice
from ibro_lightning.models import Policy, PolicySource
from ibro_lightning.modules.base import PolicyModule, local_folders
from ibro_lightning.modules.batching import token_budget_batches
from ibro_lightning.modules.reference import ReferenceKL
from ibro_lightning.sequences import Sequences
from ibro_lightning.types import Rollout


class ScoringModule(PolicyModule):
    """Scores sequences in micro-batches, and knows what the whole rollout looks like over all ranks.

    Args:
        policy: see :class:`PolicyModule`.
        kl: a KL penalty to a reference policy; None, as in DAPO and in the paper, has none.
        overlong_filter: leave responses that were cut at the length limit out of the loss. Advantages still compare
            with them.
        micro_batch_tokens: tokens in memory at once, padding included; changes speed and memory, never the result.
        policy_settings: optimizer, warmup_steps, max_grad_norm, policy_options, as in :class:`PolicyModule`.
    """

    def __init__(
        self,
        policy: str | PolicySource,
        kl: ReferenceKL | None = None,
        overlong_filter: bool = False,
        micro_batch_tokens: int = 16384,
        **policy_settings: Any,
    ) -> None:
        super().__init__(policy, **policy_settings)
        check_at_least("model.micro_batch_tokens", micro_batch_tokens, 1)
        self.kl, self.overlong_filter, self.micro_batch_tokens = kl, overlong_filter, micro_batch_tokens
        if kl is not None:
            kl.setup(self.policy_source, self.policy_options)

    def check_packing(self) -> None:
        super().check_packing()
        if self.kl is not None:
            self.kl.on(self.device, self.sharding).check_packing()

    def scores_first(self, rollout: Rollout) -> bool:
        """Is the rollout scored before the update? An update that can do without says so."""
        return True

    def score_rollout(self, rollout: Rollout) -> Experience:
        """The rollout as the policy sees it before the update; advantages are still 0.

        ``extra["token_rewards"]`` holds each response's reward at its last token, less a KL penalty in the reward;
        ``extra["sampler_logp"]`` what the engine sampled with.
        """
        sequences = rollout.sequences
        scored = self.scores_first(rollout)
        if scored:
            logp, entropy = self.score(sequences, rollout.temperature)
        else:
            logp, entropy = self._unscored(sequences), self._unscored(sequences)
        responses = sequences.response_mask
        rewards = torch.zeros_like(logp)
        last = (sequences.response_lengths - 1).clamp(min=0)  # an engine's deadline may leave a response empty
        rewards.scatter_(1, last[:, None], rollout.rewards[:, None].to(logp.dtype))
        extra = {"sampler_logp": rollout.sampler_logp}
        if self.kl is not None:
            reference = self.kl.on(self.device, self.sharding)
            extra["reference_logp"], _ = self.score(sequences, rollout.temperature, reference, with_entropy=False)
            extra["reference_kl"] = self.kl.penalty(logp, extra["reference_logp"])
            rewards = self.kl.take_from(rewards, extra["reference_kl"])
        counts = responses & ~rollout.late[:, None]
        return Experience(
            sequences=sequences,
            old_logp=logp,
            old_entropy=entropy,
            advantages=torch.zeros_like(logp),
            mask=counts & ~rollout.truncated[:, None] if self.overlong_filter else counts,
            groups=rollout.groups,
            temperature=rollout.temperature,
            iteration=rollout.iteration,
            prompts=rollout.prompts,
            scored=scored,
            num_groups=rollout.num_groups,
            stands_in=rollout.stands_in,
            extra={"token_rewards": rewards, **extra},
        )

    @property
    def source_folders(self) -> tuple[Path, ...]:
        reference = () if self.kl is None else local_folders(self.kl.source)
        return (*super().source_folders, *reference)

    @torch.no_grad()
    def score(
        self, sequences: Sequences, temperature: float, policy: Policy | None = None, with_entropy: bool = True
    ) -> tuple[Tensor, Tensor]:
        """``(logp, entropy)`` ``[B, T]`` under the policy as it is now (or another one), without gradients; the entropy
        is 0 if nobody wants it."""
        policy = policy or self.policy
        logp, entropy = self._unscored(sequences), self._unscored(sequences)
        for rows, _ in self.aligned_micro_batches(sequences):
            with self.memory_advice("prepare", micro := sequences.select(rows)):
                some_logp, some_entropy = policy(micro, temperature=temperature, with_entropy=with_entropy)
            width = some_logp.shape[1]
            logp[rows, :width] = some_logp
            if some_entropy is not None:
                entropy[rows, :width] = some_entropy
        return logp, entropy

    def _unscored(self, sequences: Sequences) -> Tensor:
        """``[B, T]`` zeros for scores, which are in float32, or in float64 for float64 weights."""
        dtype = torch.float64 if next(self.policy.parameters()).dtype == torch.float64 else torch.float32
        return torch.zeros(sequences.response_mask.shape, dtype=dtype, device=sequences.input_ids.device)

    def micro_batches(self, sequences: Sequences) -> Iterator[Tensor]:
        """Rows of each micro-batch, as the token budget cuts them."""
        lengths, padded = sequences.lengths.tolist(), not self.policy_options.packing
        for rows in token_budget_batches(lengths, self.micro_batch_tokens, padded=padded):
            yield rows.to(sequences.input_ids.device)

    def aligned_micro_batches(self, sequences: Sequences) -> Iterator[tuple[Tensor, bool]]:
        """``(rows, counts)`` of equally many micro-batches on every rank: a model whose weights or gradients are spread
        over ranks is run by all of them at the same time. Those that a rank has too few of are its shortest row, once
        more, and do not count."""
        batches = list(self.micro_batches(sequences))
        most = self.ranks.max(torch.tensor(len(batches), device=sequences.input_ids.device))
        yield from ((rows, True) for rows in batches)
        for _ in range(int(most) - len(batches)):
            yield sequences.lengths.argmin()[None], False

    def memory_advice(self, phase: str, micro: Sequences) -> AbstractContextManager[None]:
        """Around a micro-batch: what to change if memory runs out in it."""
        options, device = self.policy_options, micro.input_ids.device
        return memory_advice(
            phase,
            micro,
            self.micro_batch_tokens,
            packing=options.packing,
            checkpointing=options.gradient_checkpointing,
            device=device,
        )

    def observe(self, coefficient: Coefficient, measured: Tensor, experience: Experience) -> None:
        """Tell a coefficient the mean of ``measured`` ``[B, T]`` over the rollout's response tokens on all ranks."""
        mean = self.ranks.mean(measured, experience.responses).item()
        count = 0 if experience.stands_in else len(experience)
        coefficient.observe(mean, int(self.ranks.sum(torch.tensor(count, device=measured.device))))

    def whiten(self, values: Tensor, mask: Tensor) -> Tensor:
        """``[B, T]`` with mean 0 and variance 1 over the rollout's valid tokens on all ranks; 0 elsewhere."""
        mean = self.ranks.mean(values, mask)
        return masked_whiten(values, mask, mean=mean, variance=self.ranks.mean((values - mean) ** 2, mask))

    def sum_over_ranks(self, value: Tensor) -> Tensor:
        return self.ranks.sum(value)

    def context(self, seed: int = 0) -> StepContext:
        positions = getattr(self.policy_source.config(), "max_position_embeddings", None)
        return StepContext(self.policy, self.score, self.sum_over_ranks, self.tokenizer, seed, positions, self.ranks)
