"""DAPO (arXiv 2503.14476), top to bottom, with an interchangeable entropy regulariser; and its critic-free relatives.

An iteration: score → advantages → optimizer steps → micro-batches → loss → backward → clip → step. The loss, from the
probability ratio to the regulariser's term, is in :mod:`ibro_lightning.update.loss`; the work on a micro-batch in
:mod:`ibro_lightning.update.updater`. Dynamic sampling chooses prompts, so it is part of the rollout datamodule; soft
overlong punishment is a reward (``OverlongPenalty``). As in the paper there is no critic and, unless ``kl`` is set, no
KL penalty to a reference.

The relatives are options of the same module: GRPO has equal clips and a KL, Dr.GRPO ``advantage: dr_grpo`` with
``aggregation: seq-mean-token-sum-norm``, RLOO ``advantage: rloo``, REINFORCE++ ``advantage: reinforce++`` with a KL in
the reward, GSPO ``surrogate: gspo`` with ``aggregation: seq-mean-token-mean``, CISPO ``surrogate: cispo``; further ones
are in ``docs/methods.md``.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor

from ibro_lightning.batches import Rollout
from ibro_lightning.batches.experience import Experience
from ibro_lightning.batches.ragged import row_wise
from ibro_lightning.callbacks.needs import watched
from ibro_lightning.errors import check_at_least
from ibro_lightning.functional import AggregationMode, reward_to_go
from ibro_lightning.models import PolicyLike, PolicyOptions
from ibro_lightning.modules.policy_module import PolicyModule
from ibro_lightning.regularizers import EntropyRegularizer
from ibro_lightning.regularizers.advantage_noise import with_noise
from ibro_lightning.regularizers.coefficients import Coefficient
from ibro_lightning.timing import PhaseTimer
from ibro_lightning.update.advantages import AdvantageEstimator, GroupAdvantage, group_advantage
from ibro_lightning.update.correction import SamplerCorrection
from ibro_lightning.update.diagnostics import experience_metrics, observe
from ibro_lightning.update.loss import PolicyLoss
from ibro_lightning.update.micro_batches import TokenBudget
from ibro_lightning.update.reference import ReferenceKL
from ibro_lightning.update.scoring import OldLogp, Scorer
from ibro_lightning.update.surrogates import Surrogate, loss_class
from ibro_lightning.update.updater import Updater, update_metrics
from ibro_lightning.update.whitening import whiten


class DAPOModule(PolicyModule):
    """Group-relative advantages, clip-higher, dual clip, token-mean loss; no critic.

    The arguments that are not explained here are in :class:`.PolicyModule`.

    Args:
        advantage: ``grpo``: reward less the group's mean, over its standard deviation (DAPO too); ``dr_grpo``: not
            divided; ``rloo``: less the mean of the others; ``quantile``: less the group's 0.4-quantile; ``maxrl``:
            over the pass rate; ``asym_grpo``: powers of its odds; a :class:`.GroupAdvantage`, for other numbers or one
            of your own; ``reinforce++``: reward to go, whitened over the rollout, which needs no groups. Where
            accuracy does not differ, ``grpo``, ``quantile`` and ``reinforce++`` do not scale other parts of the reward
            up to the size of right and wrong (``docs/rewards.md``).
        advantage_noise: normal noise on the advantages, in standard deviations of the rollout's own, for the policy's
            loss and the regulariser alike (:mod:`.advantage_noise`); one draw per response.
    """

    policy_loss: PolicyLoss
    batch_type = Rollout
    min_group_size = 2
    advantages_need_scores = False
    """Whether :meth:`prepare` or :meth:`advantages` reads ``old_logp`` or ``old_entropy``: set True where they do."""

    def __init__(
        self,
        policy: PolicyLike,
        *,
        advantage: GroupAdvantage | AdvantageEstimator = "grpo",
        advantage_noise: float = 0.0,
        regularizer: EntropyRegularizer | None = None,
        surrogate: Surrogate | type[PolicyLoss] = "ppo",
        clip_ratio_low: Coefficient | float = 0.2,
        clip_ratio_high: Coefficient | float = 0.28,
        dual_clip: Coefficient | float | None = 10.0,
        aggregation: AggregationMode = "token-mean",
        aggregation_max_tokens: int | None = None,
        kl: ReferenceKL | None = None,
        sampler_correction: SamplerCorrection | None = SamplerCorrection(),
        old_logp: OldLogp = "policy",
        overlong_filter: bool = False,
        mini_batch_prompts: int | None = None,
        update_epochs: int = 1,
        micro_batch_tokens: int = 16384,
        optimizer: OptimizerCallable = torch.optim.AdamW,
        learning_rate: float = 1e-6,
        warmup_steps: int = 10,
        lr_scheduler: LRSchedulerCallable | None = None,
        max_grad_norm: float | None = 1.0,
        max_nonfinite_steps: int = 5,
        policy_options: PolicyOptions = PolicyOptions(),
    ) -> None:
        super().__init__(
            policy,
            optimizer=optimizer,
            learning_rate=learning_rate,
            warmup_steps=warmup_steps,
            lr_scheduler=lr_scheduler,
            policy_options=policy_options,
        )
        check_at_least("advantage_noise", advantage_noise, 0)
        self.advantage, self.group_advantage = advantage, group_advantage(advantage)
        self.advantage_noise = advantage_noise
        if self.group_advantage is None:  # REINFORCE++
            self.min_group_size = 1
        self.policy_loss = loss_class(surrogate)(
            regularizer,
            clip_ratio_low=clip_ratio_low,
            clip_ratio_high=clip_ratio_high,
            dual_clip=dual_clip,
            aggregation=aggregation,
            aggregation_max_tokens=aggregation_max_tokens,
            sampler_correction=sampler_correction,
            kl=kl,
        )
        self.regularizer, self.learns_off_policy = self.policy_loss.regularizer, sampler_correction is not None
        budget = TokenBudget(micro_batch_tokens, policy_options.packing, policy_options.gradient_checkpointing)
        self.scorer = Scorer(self.loop, self.policy_loss, budget, overlong_filter=overlong_filter, old_logp=old_logp)
        self.updater = Updater(
            self.loop,
            budget,
            mini_batch_prompts=mini_batch_prompts,
            update_epochs=update_epochs,
            max_grad_norm=max_grad_norm,
            max_nonfinite_steps=max_nonfinite_steps,
        )
        if kl is not None:
            kl.setup(self.policy_source, policy_options)

    def training_step(self, rollout: Rollout, batch_idx: int) -> dict[str, float]:
        """One Lightning batch is one rollout."""
        loss, updater, timer = self.policy_loss, self.updater, PhaseTimer()
        if not updater.start_iteration(rollout):
            return {"update/skipped_rollouts": 1.0}
        context = self.context()
        measured: list[dict[str, float]] = []
        loss.start_iteration()
        with timer("prepare"), torch.no_grad():
            experience = self.prepare(rollout)  # score → advantages [N]
            observe(loss.entropy_observers, experience.old_entropy, experience, self.ranks)
        further = watched(self, rollout, experience)
        with timer("update"):
            steps = updater.steps(experience, loss, context)
            for step in steps:  # whole groups [n]
                done, metrics = updater.update(step, loss, context)  # micro-batches → loss → backward → clip → step
                steps.keep(done)
                measured.append(metrics)
            scored = steps.experience
            shift = updater.policy_shift(measured, scored, context)
        self.report_skipped_steps(rollout)
        curves = {**update_metrics(experience, measured, self.ranks), **self.experience_metrics(scored, rollout)}
        if self.kl is not None:  # for the next iteration: the logged coefficient is the one used in this
            observe([self.kl.coefficient], scored.extra["reference_kl"], scored, self.ranks)
        return {**curves, **further, **shift, **timer.metrics()}

    def prepare(self, rollout: Rollout) -> Experience:
        """Compute what stays fixed during the update, without gradients."""
        first_step = None if self.scores_first(rollout) else self.updater.first_step(rollout)
        experience = self.scorer(rollout, first_step=first_step)
        experience = replace(experience, advantages=self.advantages(experience))
        return with_noise(experience, self.advantage_noise, self.ranks)

    def scores_first(self, rollout: Rollout) -> bool:
        """Whether all old log-probs are computed before the update.

        The first optimizer step sees the policy that sampled, so its own forward pass gives those of its rows, which
        saves one; unless they are needed earlier.
        """
        return self.advantages_need_scores or self.scorer.needs_scores

    def advantages(self, experience: Experience) -> Tensor:
        """The advantages ``[N]`` of the configured estimator."""
        assert experience.token_rewards is not None, "the scorer sets them"
        assert experience.rewards is not None
        if self.group_advantage is None:
            (to_go,) = row_wise(
                lambda _, mask, rewards: reward_to_go(rewards, mask), experience.lengths, experience.token_rewards
            )  # [N]
            return whiten(to_go, experience, self.ranks)
        span = 1.0 if experience.outcome_span is None else experience.outcome_span
        advantages = self.group_advantage(experience.rewards, experience.groups, experience.outcomes, span)  # [B]
        return experience.per_token(advantages)  # [N]

    def experience_metrics(self, experience: Experience, rollout: Rollout) -> dict[str, float]:
        """The curves of a rollout and of the policy before the update."""
        return experience_metrics(experience, rollout, self.policy_loss, self.ranks)
