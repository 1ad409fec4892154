"""The loop that all policy-gradient algorithms share: prepare → mini-batches → micro-batches → step.

An algorithm overrides two methods: :meth:`ActorModule.prepare` (a rollout → fixed advantages) and
:meth:`ActorModule.policy_loss` (a micro-batch → per-token loss). The regulariser's term is added here, once for all.
"""

from __future__ import annotations

from abc import abstractmethod
from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from ibro_lightning.errors import check_at_least
from ibro_lightning.functional import approximate_kl, token_mean
from ibro_lightning.models import PolicySource
from ibro_lightning.modules.base import PolicyModule
from ibro_lightning.modules.batching import mini_batches, token_budget_batches
from ibro_lightning.modules.diagnostics import experience_metrics
from ibro_lightning.regularizers import EntropyRegularizer, NoRegularizer
from ibro_lightning.seeding import derive_seed, run_seed
from ibro_lightning.sequences import Sequences
from ibro_lightning.timing import PhaseTimer
from ibro_lightning.types import Experience, Rollout, TokenStats


class ActorModule(PolicyModule):
    """Base of the reinforcement-learning modules. One Lightning batch is one rollout.

    Args:
        policy: see :class:`PolicyModule`.
        regularizer: an entropy term added to the loss.
        mini_batch_prompts: prompts (whole groups) per optimizer step; None takes the rollout in one step.
        update_epochs: passes over each rollout.
        micro_batch_tokens: padded tokens in memory at once; changes speed and memory, never the result.
        policy_settings: optimizer, warmup_steps, max_grad_norm, policy_options, as in :class:`PolicyModule`.
    """

    def __init__(
        self,
        policy: str | PolicySource,
        regularizer: EntropyRegularizer | None = None,
        mini_batch_prompts: int | None = None,
        update_epochs: int = 1,
        micro_batch_tokens: int = 16384,
        **policy_settings: Any,
    ) -> None:
        super().__init__(policy, **policy_settings)
        for name, value in (
            ("mini_batch_prompts", mini_batch_prompts),
            ("update_epochs", update_epochs),
            ("micro_batch_tokens", micro_batch_tokens),
        ):
            if value is not None:
                check_at_least(f"model.{name}", value, 1)
        self.regularizer = regularizer or NoRegularizer()
        self.mini_batch_prompts, self.update_epochs = mini_batch_prompts, update_epochs
        self.micro_batch_tokens = micro_batch_tokens

    @abstractmethod
    def prepare(self, rollout: Rollout) -> Experience:
        """Everything that stays fixed during the update, without gradients."""

    @abstractmethod
    def policy_loss(self, stats: TokenStats) -> tuple[Tensor, dict[str, Tensor]]:
        """``(loss [B, T], metrics [B, T] each)`` of one micro-batch; all are averaged over the step's valid tokens."""

    def training_step(self, rollout: Rollout, batch_idx: int) -> dict[str, float]:
        if rollout.skip_update:
            return {"update/skipped_rollouts": 1.0}
        timer = PhaseTimer()
        with timer("prepare"), torch.no_grad():
            experience = self.prepare(rollout)
        with timer("update"):
            steps = [self.update(experience.select(rows)) for rows in self._mini_batches(experience, rollout.iteration)]
        if skipped := sum(step["update/skipped_steps"] for step in steps):
            rank_zero_warn(
                f"iteration {rollout.iteration}: {skipped:.0f} of {len(steps)} optimizer steps left out: "
                "the gradient is not finite"
            )
        return {
            "update/skipped_rollouts": 0.0,
            "update/steps": float(len(steps)),
            **experience_metrics(experience, rollout),
            **_mean_of(steps),
            **timer.metrics(),
        }

    def update(self, experience: Experience) -> dict[str, float]:
        """One optimizer step on one mini-batch, in as many micro-batches as the token budget asks for."""
        num_tokens = self.sum_over_ranks(experience.mask.sum()).clamp(min=1)
        totals: dict[str, float] = defaultdict(float)
        for rows in token_budget_batches(experience.sequences.lengths.tolist(), self.micro_batch_tokens):
            stats = self.token_stats(experience.select(rows.to(self.device)))
            loss, metrics = self.loss(stats, num_tokens)
            # DDP and FSDP average gradients over ranks; the loss is already divided by the tokens of all ranks.
            self.manual_backward(loss * self.trainer.world_size)
            for name, value in metrics.items():
                totals[name] += value
        return {**totals, **self.optimizer_step_clipped()}

    def loss(self, stats: TokenStats, num_tokens: Tensor) -> tuple[Tensor, dict[str, float]]:
        """``agg(policy loss) − α·agg(regulariser)``, with ``agg`` the token mean over the whole step.

        Args:
            num_tokens: valid tokens of the whole step, so that the micro-batches' losses add up to the step's loss.
        """
        per_token, extra = self.policy_loss(stats)
        loss = policy_loss = token_mean(per_token, stats.mask, num_tokens)
        metrics = {"update/policy_loss": policy_loss.item()}
        if self.regularizer.coef:
            objective = token_mean(self.regularizer.objective(stats), stats.mask, num_tokens)
            loss = policy_loss - self.regularizer.coef * objective
            metrics["update/regularizer"] = objective.item()
        extra["update/approx_kl"] = approximate_kl(stats.logp.detach(), stats.old_logp)
        for name, values in extra.items():
            metrics[name] = token_mean(values.detach().float(), stats.mask, num_tokens).item()
        return loss, metrics

    def token_stats(self, micro: Experience) -> TokenStats:
        """Run the current policy over a micro-batch, with gradients."""
        with_entropy = bool(self.regularizer.coef) and self.regularizer.needs_entropy
        logp, entropy = self.policy(micro.sequences, temperature=micro.temperature, with_entropy=with_entropy)
        return TokenStats(logp, entropy, micro.old_logp, micro.old_entropy, micro.advantages, micro.mask)

    @torch.no_grad()
    def score(self, sequences: Sequences, temperature: float) -> tuple[Tensor, Tensor]:
        """``(logp, entropy)`` ``[B, T]`` under the policy as it is now, without gradients."""
        mask = sequences.response_mask
        dtype = torch.float64 if next(self.policy.parameters()).dtype == torch.float64 else torch.float32
        logp, entropy = (torch.zeros(mask.shape, dtype=dtype, device=mask.device) for _ in range(2))
        for rows in token_budget_batches(sequences.lengths.tolist(), self.micro_batch_tokens):
            rows = rows.to(mask.device)
            some_logp, some_entropy = self.policy(sequences.select(rows), temperature=temperature)
            width = some_logp.shape[1]
            logp[rows, :width], entropy[rows, :width] = some_logp, some_entropy
        return logp, entropy

    def sum_over_ranks(self, value: Tensor) -> Tensor:
        reduced: Any = self.trainer.strategy.reduce(value, reduce_op="sum")
        return reduced

    def _mini_batches(self, experience: Experience, iteration: int) -> Iterator[Tensor]:
        for epoch in range(self.update_epochs):
            seed = derive_seed(run_seed(), "mini-batches", iteration, epoch)
            for rows in mini_batches(experience.groups, self.mini_batch_prompts, seed):
                yield rows.to(self.device)


def _mean_of(steps: list[dict[str, float]]) -> Mapping[str, float]:
    """The mean of each metric over the steps that report it; counters of skipped steps are added up."""
    names = dict.fromkeys(name for step in steps for name in step)
    columns = {name: [step[name] for step in steps if name in step] for name in names}
    return {
        name: sum(values) if name == "update/skipped_steps" else sum(values) / len(values)
        for name, values in columns.items()
    }
