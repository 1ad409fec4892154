"""The loop that all policy-gradient algorithms share: prepare → optimizer steps → micro-batches → step.

An algorithm overrides :meth:`ActorModule.prepare` (a rollout → fixed advantages), and, if none of the options will do,
:meth:`ActorModule.policy_loss`. The regulariser's term is added here, once for all.
"""

from __future__ import annotations

from abc import abstractmethod
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from lightning.pytorch.strategies import ParallelStrategy
from torch import Tensor

from ibro_lightning.coefficients import Constant
from ibro_lightning.errors import check_at_least
from ibro_lightning.experience import Experience, TokenStats
from ibro_lightning.functional import (
    AggregationMode,
    aggregation_weights,
    approximate_kl,
    token_mean,
)
from ibro_lightning.models import PolicySource
from ibro_lightning.modules.batching import check_aggregation, losses_of, mini_batches, rows_of, weighted_sum
from ibro_lightning.modules.correction import SamplerCorrection
from ibro_lightning.modules.diagnostics import experience_metrics
from ibro_lightning.modules.nonfinite import advantages_are_finite
from ibro_lightning.modules.scoring import ScoringModule
from ibro_lightning.modules.surrogates import Clips, Surrogate, check_surrogate, surrogate_loss
from ibro_lightning.regularizers import EntropyRegularizer, NoRegularizer
from ibro_lightning.seeding import derive_seed, run_seed, update_seed
from ibro_lightning.timing import PhaseTimer
from ibro_lightning.types import Rollout

SKIPPED = "/skipped_steps"


class ActorModule(ScoringModule):
    """Base of the reinforcement-learning modules. One Lightning batch is one rollout.

    Args:
        policy: see :class:`PolicyModule`.
        regularizer: an entropy method.
        surrogate: the policy loss. ``ppo``: each token's clipped ratio (PPO, GRPO, DAPO); ``gspo``: one clipped ratio
            per sequence (with clip ratios near 3e-4 and aggregation ``seq-mean-token-mean``); ``cispo``: the clipped
            ratio as a weight, no token loses its gradient.
        clip_ratio_low, clip_ratio_high: the probability ratio is clipped to [1 − low, 1 + high].
        dual_clip: bounds the loss of negative advantages by c·|A|; None switches it off. Not in ``cispo``.
        aggregation: how token losses become one number; denominators count the whole optimizer step.
        aggregation_max_tokens: the constant length of ``seq-mean-token-sum-norm`` (Dr.GRPO).
        mini_batch_prompts: prompts (whole groups) per optimizer step; None takes the rollout in one step.
        update_epochs: passes over each rollout.
        sampler_correction: weighs the policy loss for an engine whose probabilities are not quite the policy's; None
            leaves it as it is. How far they are apart is in the curves as ``sampler/…`` in any case.
        scoring_settings: kl, overlong_filter, micro_batch_tokens, as in :class:`ScoringModule`, and optimizer,
            warmup_steps, max_grad_norm, policy_options, as in :class:`PolicyModule`.
    """

    def __init__(
        self,
        policy: str | PolicySource,
        regularizer: EntropyRegularizer | None = None,
        surrogate: Surrogate = "ppo",
        clip_ratio_low: float = 0.2,
        clip_ratio_high: float = 0.28,
        dual_clip: float | None = 10.0,
        aggregation: AggregationMode = "token-mean",
        aggregation_max_tokens: int | None = None,
        mini_batch_prompts: int | None = None,
        update_epochs: int = 1,
        sampler_correction: SamplerCorrection | None = SamplerCorrection(),
        **scoring_settings: Any,
    ) -> None:
        super().__init__(policy, **scoring_settings)
        for name, value in (("mini_batch_prompts", mini_batch_prompts), ("update_epochs", update_epochs)):
            if value is not None:
                check_at_least(f"model.{name}", value, 1)
        check_aggregation(aggregation, aggregation_max_tokens)
        self.regularizer = regularizer or NoRegularizer()
        self.surrogate, self.clips = surrogate, Clips(clip_ratio_low, clip_ratio_high, dual_clip)
        check_surrogate(self.surrogate, self.clips)
        self.aggregation: AggregationMode = aggregation
        self.aggregation_max_tokens = aggregation_max_tokens
        self.mini_batch_prompts, self.update_epochs = mini_batch_prompts, update_epochs
        self.sampler_correction = sampler_correction

    @abstractmethod
    def prepare(self, rollout: Rollout) -> Experience:
        """Everything that stays fixed during the update, without gradients: :meth:`score_rollout` and advantages."""

    def training_step(self, rollout: Rollout, batch_idx: int) -> dict[str, float]:
        on_time = self.ranks.sum((~rollout.late).sum())
        if rollout.skip_update or not on_time:
            return {"update/skipped_rollouts": 1.0}
        timer = PhaseTimer()
        self.nonfinite.begin()
        with timer("prepare"), torch.no_grad():
            experience = self.prepare(rollout)
            if self.trains_policy(rollout.iteration) and experience.scored:
                self.observe(self.regularizer.coefficient, experience.old_entropy, experience)
        with timer("update"):
            steps = [self.update_if_finite(step) for step in self.steps(experience)]
        if not experience.scored:
            self.observe(self.regularizer.coefficient, experience.old_entropy, experience)
        self.report_skipped_steps(rollout)
        metrics = self.experience_metrics(experience, rollout)
        if self.kl is not None:  # for the next iteration: this one has used the coefficient that is logged
            self.observe(self.kl.coefficient, experience.extra["reference_kl"], experience)
        return {
            "update/skipped_rollouts": 0.0,
            "update/steps": float(len(steps)),
            "update/scored_first": float(experience.scored),
            **metrics,
            **_mean_of(steps),
            **timer.metrics(),
        }

    def trains_policy(self, iteration: int) -> bool:
        """Does the policy learn in this iteration (from 1)?"""
        return True

    advantages_need_scores = True
    """Whether :meth:`prepare` reads ``old_logp`` or ``old_entropy``; a module that does not can save a forward pass."""

    def scores_first(self, rollout: Rollout) -> bool:
        """Are the old log-probs computed before the update?

        With one optimizer step, which sees the policy as it sampled, they are the update's own: a forward pass is
        saved. Not if anything else asks for them earlier.
        """
        size = self.mini_batch_prompts
        steps = self.update_epochs * (1 if size is None else -(-rollout.num_groups // size))
        return (
            steps > 1
            or not self.trains_policy(rollout.iteration)
            or self.advantages_need_scores
            or self.kl is not None
            or not isinstance(self.regularizer.coefficient, Constant)
            or self.regularizer.prepare_needs_scores
        )

    # From a rollout to optimizer steps.

    def steps(self, experience: Experience) -> Iterator[Experience]:
        """The optimizer steps on a rollout, each with its weights and with what the regulariser prepared."""
        for epoch in range(self.update_epochs):
            seed = update_seed(run_seed(), experience.iteration, epoch)
            parts = mini_batches(experience.groups, self.mini_batch_prompts, seed, experience.num_groups)
            for index, rows in enumerate(parts):
                if experience.scored:
                    step = rows_of(experience, rows.to(experience.groups.device))
                else:
                    if (epoch, index) != (0, 0):
                        raise RuntimeError("a second optimizer step needs log-probs from before the first")
                    step = experience  # itself: the update writes into it
                yield self.begin_step(step, derive_seed(seed, index))

    @torch.no_grad()
    def begin_step(self, step: Experience, seed: int = 0) -> Experience:
        """What depends on the whole step, fixed before it is cut into micro-batches."""
        num_tokens = self.sum_over_ranks(step.mask.sum()).clamp(min=1)
        weights = aggregation_weights(
            step.mask,
            self.aggregation,
            num_tokens=num_tokens,
            num_sequences=self.sum_over_ranks(step.mask.any(dim=1).sum()).clamp(min=1),
            max_tokens=self.aggregation_max_tokens,
            dtype=step.old_logp.dtype,
        )
        step = replace(step, weights=weights, num_tokens=num_tokens)
        prepared = self.regularizer.prepare(step, self.context(seed))
        added = {name: values for name, values in prepared.extra.items() if name not in step.extra}
        means = {f"regularizer/{name}": self.ranks.mean(v.float(), step.mask).item() for name, v in added.items()}
        return replace(prepared, metrics=means)

    # One optimizer step.

    def update_if_finite(self, step: Experience) -> dict[str, float]:
        """The step, unless there is no sense in it."""
        if advantages_are_finite(step, self.ranks):
            return self.update(step)
        self.nonfinite.saw("policy", "advantage", step)
        return {f"update{SKIPPED}": 1.0}

    def update(self, step: Experience) -> dict[str, float]:
        """One optimizer step of the policy, in as many micro-batches as the token budget asks for."""

        def loss_of(micro: Experience, rows: Tensor) -> tuple[Tensor, dict[str, float]]:
            stats = self.token_stats(micro)
            if not step.scored:
                step.record(rows, stats.old_logp, stats.old_entropy)
            return self.loss(stats, micro)

        metrics = self.accumulate(step, loss_of)
        return {**step.metrics, **metrics, **self.optimizer_step_clipped(losses_of(metrics), step)}

    def accumulate(
        self, step: Experience, loss_of: Callable[[Experience, Tensor], tuple[Tensor, Mapping[str, float]]]
    ) -> dict[str, float]:
        """Add up gradients and metrics over the step's micro-batches; ``loss_of`` gets each, and its rows."""
        totals: dict[str, float] = defaultdict(float)
        batches = list(self.aligned_micro_batches(step.sequences))
        for number, (rows, counts) in enumerate(batches, start=1):
            # DDP and FSDP average gradients over ranks; the weights already divide by the tokens of all ranks.
            scale = self.ranks.size if counts else 0.0
            micro = step.select(rows)
            with self.memory_advice("update", micro.sequences):
                loss, metrics = loss_of(micro, rows)
                with self.gradients_added_up(last=number == len(batches)):
                    self.manual_backward(loss * scale)
            for name, value in metrics.items() if counts else ():
                totals[name] += value
        return self.total_over_ranks(totals)

    def gradients_added_up(self, *, last: bool) -> AbstractContextManager[None]:
        """DDP exchanges gradients in the backward pass: with the last micro-batch of a step, once for all of them."""
        strategy = self.trainer.strategy
        if last or not isinstance(strategy, ParallelStrategy):
            return nullcontext()
        blocked: AbstractContextManager[None] = strategy.block_backward_sync()
        return blocked

    def total_over_ranks(self, metrics: Mapping[str, float]) -> dict[str, float]:
        """Each metric added up over the ranks; all of them have the same."""
        if self.ranks.size == 1:
            return dict(metrics)
        shares = torch.tensor(list(metrics.values()), dtype=torch.float64, device=self.device)
        return dict(zip(metrics, self.ranks.sum(shares).tolist(), strict=True))

    def loss(self, stats: TokenStats, micro: Experience) -> tuple[Tensor, dict[str, float]]:
        """``agg(policy loss) − α·agg(regulariser)`` of a micro-batch, and its share of the step's metrics."""
        per_token, extra = self.policy_loss(stats)
        if self.sampler_correction is not None and "sampler_logp" in stats.extra:
            per_token = (
                per_token * self.sampler_correction(stats.old_logp, stats.extra["sampler_logp"], stats.mask).weights
            )
        per_token = self.regularizer.shape_policy_loss(per_token, stats)
        loss = weighted_sum(per_token, micro)
        metrics = {"update/policy_loss": loss.item()}
        if self.kl is not None:
            loss = weighted_sum(self.kl.add_to(per_token, stats.logp, stats.extra["reference_logp"]), micro)
        if self.regularizer.coef:
            objective = weighted_sum(self.regularizer.objective(stats), micro)
            loss = loss - self.regularizer.coef * objective
            metrics["update/regularizer"] = objective.item()
        extra["update/approx_kl"] = approximate_kl(stats.logp.detach(), stats.old_logp)
        added = stats.extra.keys() - micro.extra.keys()
        extra |= {f"regularizer/{name}": stats.extra[name] for name in added}
        for name, values in extra.items():
            metrics[name] = token_mean(values.detach().float(), stats.mask, micro.num_tokens).item()
        return loss, metrics

    def policy_loss(self, stats: TokenStats) -> tuple[Tensor, dict[str, Tensor]]:
        """``(loss [B, T], metrics [B, T] each)`` of one micro-batch; metrics are averaged over the step's tokens."""
        surrogate = surrogate_loss(self.surrogate, stats, self.clips)
        return surrogate.loss, {
            "update/clipped_low": surrogate.clipped_low,
            "update/clipped_high": surrogate.clipped_high,
            "update/clipped_dual": surrogate.clipped_dual,
        }

    def token_stats(self, micro: Experience) -> TokenStats:
        """Run the current policy over a micro-batch, with gradients."""
        active = bool(self.regularizer.coef)
        with_entropy = (active and self.regularizer.needs_entropy) or not micro.scored
        logp, entropy = self.policy(micro.sequences, temperature=micro.temperature, with_entropy=with_entropy)
        if not micro.scored:  # this is the only update: the policy is still the old one
            assert entropy is not None
            micro = replace(micro, old_logp=logp.detach(), old_entropy=entropy.detach())
        extra = {**micro.extra, **(self.regularizer.statistics(micro, self.context()) if active else {})}
        return TokenStats(logp, entropy, micro.old_logp, micro.old_entropy, micro.advantages, micro.mask, extra)

    def experience_metrics(self, experience: Experience, rollout: Rollout) -> dict[str, float]:
        """What the curves show of a rollout before the update."""
        kl = {} if self.kl is None else {"kl/coef": self.kl.coef}
        measured = experience_metrics(experience, rollout, self.sampler_correction, self.ranks)
        return {**measured, "regularizer/coef": self.regularizer.coef, **kl}

    # The coefficients' state is part of the checkpoint.

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint["coefficients"] = {name: coef.state_dict() for name, coef in self._coefficients().items()}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        saved = checkpoint.get("coefficients", {})
        for name, coefficient in self._coefficients().items():
            if name in saved:
                coefficient.load_state_dict(saved[name])

    def _coefficients(self) -> dict[str, Any]:
        kl = {} if self.kl is None else {"kl": self.kl.coefficient}
        return {"regularizer": self.regularizer.coefficient, **kl}


def _mean_of(steps: list[dict[str, float]]) -> Mapping[str, float]:
    """The mean of each metric over the steps that report it; counters of skipped steps are added up."""
    names = dict.fromkeys(name for step in steps for name in step)
    columns = {name: [step[name] for step in steps if name in step] for name in names}
    return {
        name: sum(values) if name.endswith(SKIPPED) else sum(values) / len(values) for name, values in columns.items()
    }
