"""PPO with a critic (arXiv 1707.06347) for language models, top to bottom, with an interchangeable entropy regulariser.

One token is one action, the reward comes with the last, and the critic estimates the return before every token.
An iteration: score → values → advantages → optimizer steps; in each step, first the policy and then the critic goes
through the micro-batches: loss → backward → clip → step. The losses are in :mod:`ibro_lightning.update.loss` and
:mod:`~ibro_lightning.update.value_loss`, a KL penalty in :mod:`~ibro_lightning.update.reference`.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import ClassVar

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor

from ibro_lightning.batches import Rollout
from ibro_lightning.batches.experience import Experience
from ibro_lightning.batches.ragged import row_wise
from ibro_lightning.callbacks.needs import watched
from ibro_lightning.errors import ConfigError, check_at_least, check_count, is_number
from ibro_lightning.functional import (
    GAE,
    AggregationMode,
    explained_variance,
    gae,
    length_adaptive_lambda,
    reward_to_go,
)
from ibro_lightning.models import (
    Critic,
    PolicyLike,
    PolicyOptions,
    as_source,
    build_critic,
    check_same_vocabulary,
    export_folder,
)
from ibro_lightning.models.pretrained import local_folders
from ibro_lightning.modules.policy_module import PolicyModule
from ibro_lightning.regularizers import EntropyRegularizer
from ibro_lightning.regularizers.advantage_noise import with_noise
from ibro_lightning.regularizers.coefficients import Coefficient
from ibro_lightning.timing import PhaseTimer
from ibro_lightning.update.correction import SamplerCorrection
from ibro_lightning.update.diagnostics import experience_metrics, observe
from ibro_lightning.update.loss import PolicyLoss
from ibro_lightning.update.micro_batches import TokenBudget
from ibro_lightning.update.optimizer import check_optimizer
from ibro_lightning.update.reference import ReferenceKL
from ibro_lightning.update.scoring import OldLogp, Scorer
from ibro_lightning.update.surrogates import Surrogate, loss_class
from ibro_lightning.update.updater import Updater, update_metrics
from ibro_lightning.update.value_loss import ValueLoss
from ibro_lightning.update.whitening import whiten


class PPOModule(PolicyModule):
    """Generalised advantage estimation, whitened advantages, a clipped value loss, a critic with its own optimizer.

    The arguments that are not explained here are in :class:`.PolicyModule`.

    Args:
        critic: the initial critic: the folder of a critic (``critic/`` of an earlier run) or of a language model, whose
            values all start at 0; None takes the policy's.
        critic_optimizer: called with the critic's parameters; ``warmup_steps``, ``lr_scheduler`` and ``max_grad_norm``
            apply to both.
        critic_learning_rate: the critic's; an ``lr`` of ``critic_optimizer`` replaces it.
        gamma: discount per token.
        gae_lambda: λ of the policy's advantages.
        critic_gae_lambda: λ of the critic's returns; None takes ``gae_lambda``. 1 gives unbiased returns (VAPO).
        length_adaptive_alpha: in place of ``gae_lambda``, λ = 1 − 1/(α·length) for each response (VAPO, 0.05).
        value_clip: how far a value may move from its old one before the loss stops rewarding it; None: no bound.
        whiten_advantages: mean 0 and variance 1 over the rollout's tokens that take part in the loss; less variance
            where all of the rollout is right or wrong (``docs/rewards.md``). Generalised advantages span
            the whole response: a token sampled without a finite log-prob stays in them, but out of both losses.
        advantage_noise: normal noise on the advantages, in standard deviations of the rollout's own, for the policy's
            loss and the regulariser alike (:mod:`.advantage_noise`); one draw per token. Returns have none.
        bootstrap_truncated: continue a response cut at the length limit with the critic's value instead of 0.
        critic_warmup_iterations: the first iterations, in which only the critic learns.
    """

    policy_loss: PolicyLoss
    batch_type = Rollout
    trained: ClassVar = {**PolicyModule.trained, "critic": ("critic_optimizer", "critic_learning_rate")}
    advantages_need_scores = False
    """Whether :meth:`prepare` reads ``old_logp`` or ``old_entropy``: set True where it does."""

    def __init__(
        self,
        policy: PolicyLike,
        *,
        critic: PolicyLike | None = None,
        critic_optimizer: OptimizerCallable = torch.optim.AdamW,
        critic_learning_rate: float = 1e-5,
        gamma: float = 1.0,
        gae_lambda: float = 1.0,
        critic_gae_lambda: float | None = None,
        length_adaptive_alpha: float | None = None,
        value_clip: float | None = 0.5,
        whiten_advantages: bool = True,
        advantage_noise: float = 0.0,
        bootstrap_truncated: bool = False,
        critic_warmup_iterations: int = 0,
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
        critic_lambda = gae_lambda if critic_gae_lambda is None else critic_gae_lambda
        for name, share in (("gamma", gamma), ("gae_lambda", gae_lambda), ("critic_gae_lambda", critic_lambda)):
            if not (is_number(share) and 0 <= share <= 1):
                raise ConfigError(name, share, "write a number from 0 to 1")
        for name, bound in (("value_clip", value_clip), ("length_adaptive_alpha", length_adaptive_alpha)):
            if bound is not None and not (is_number(bound) and bound > 0):
                raise ConfigError(name, bound, "write a positive number, or null to switch it off")
        check_count("critic_warmup_iterations", critic_warmup_iterations, 0)
        check_at_least("advantage_noise", advantage_noise, 0)
        check_at_least("critic_learning_rate", critic_learning_rate, 0)
        check_optimizer(critic_optimizer, "critic_optimizer")
        self.critic_source = self.policy_source
        if critic is not None:
            self.critic_source = as_source(critic, policy_options, "critic")
            check_same_vocabulary(self.policy_source, self.critic_source, "critic")
        self.critic_optimizer_factory, self.critic_learning_rate = critic_optimizer, critic_learning_rate
        self.gamma, self.gae_lambda, self.critic_gae_lambda = gamma, gae_lambda, critic_lambda
        self.length_adaptive_alpha = length_adaptive_alpha
        self.whiten_advantages, self.bootstrap_truncated = whiten_advantages, bootstrap_truncated
        self.critic_warmup_iterations, self.advantage_noise = critic_warmup_iterations, advantage_noise
        self.critic: Critic
        self.value_loss = ValueLoss(self.loop, value_clip)
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

    def configure_model(self) -> None:
        super().configure_model()
        if self._trainer is not None and isinstance(strategy := self.trainer.strategy, DDPStrategy):
            # A backward pass reaches one of the two networks; DDP would wait for the gradients of both.
            strategy._ddp_kwargs.setdefault("find_unused_parameters", True)
        if not hasattr(self, "critic"):
            self.critic = build_critic(self.critic_source, self.policy_options, self.sharding)

    def training_step(self, rollout: Rollout, batch_idx: int) -> dict[str, float]:
        """One Lightning batch is one rollout."""
        loss, updater, timer = self.policy_loss, self.updater, PhaseTimer()
        if not updater.start_iteration(rollout):
            return {"update/skipped_rollouts": 1.0}
        context = self.context()
        measured: list[dict[str, float]] = []
        if trains_policy := self.trains_policy(rollout.iteration):
            loss.start_iteration()
        with timer("prepare"), torch.no_grad():
            experience = self.prepare(rollout)  # score → values → advantages [N]
            if trains_policy:
                observe(loss.entropy_observers, experience.old_entropy, experience, self.ranks)
        further = watched(self, rollout, experience)
        with timer("update"):
            steps = updater.steps(experience, loss, context)
            for step in steps:  # whole groups [n]
                done, metrics = updater.update(step, loss, context) if trains_policy else (step, {})
                _, of_critic = updater.update(done, self.value_loss, context, "critic")
                steps.keep(done)
                measured.append({**metrics, **of_critic})
            scored = steps.experience
            shift = updater.policy_shift(measured, scored, context)
        self.report_skipped_steps(rollout)
        curves = {**update_metrics(experience, measured, self.ranks), **self.experience_metrics(scored, rollout)}
        if self.kl is not None and trains_policy:  # for the next iteration: this one has used the logged coefficient
            observe([self.kl.coefficient], scored.extra["reference_kl"], scored, self.ranks)
        return {**curves, **further, **shift, **timer.metrics()}

    def prepare(self, rollout: Rollout) -> Experience:
        """Compute what stays fixed during the update, without gradients."""
        first_step = None if self.scores_first(rollout) else self.updater.first_step(rollout)
        experience = self.scorer(rollout, first_step=first_step)
        values, last_values = self.scorer.values(self.critic, experience.sequences)  # [N], [B]
        last_values = last_values * rollout.truncated  # [B]
        lam: float | Tensor = self.gae_lambda
        if self.length_adaptive_alpha is not None:
            lam = length_adaptive_lambda(experience.lengths, alpha=self.length_adaptive_alpha)  # [B]
        assert experience.token_rewards is not None, "the scorer sets them"

        def estimate(rows: Tensor, mask: Tensor, rewards: Tensor, values: Tensor) -> GAE:  # of some rows, [b, t]
            return gae(
                rewards,
                values,
                mask,
                gamma=self.gamma,
                lam=lam[rows] if isinstance(lam, Tensor) else lam,
                critic_lam=self.critic_gae_lambda,
                last_values=last_values[rows] if self.bootstrap_truncated else None,
            )

        advantages, returns = row_wise(estimate, experience.lengths, experience.token_rewards, values)  # [N] each
        if self.whiten_advantages:
            advantages = whiten(advantages, experience, self.ranks)
        experience = replace(experience, advantages=advantages).with_extra(values=values, returns=returns)
        return with_noise(experience, self.advantage_noise, self.ranks)

    def scores_first(self, rollout: Rollout) -> bool:
        """Whether all old log-probs are computed before the update: as in :class:`DAPOModule`, and while the critic
        warms up, since the policy then has no update to compute them in."""
        needed = self.advantages_need_scores or self.scorer.needs_scores
        return needed or not self.trains_policy(rollout.iteration)

    def trains_policy(self, iteration: int) -> bool:
        """Whether the policy learns in this iteration (from 1), or only the critic."""
        return not 0 < iteration <= self.critic_warmup_iterations

    def experience_metrics(self, experience: Experience, rollout: Rollout) -> dict[str, float]:
        """The curves of a rollout, the policy and the critic before the update. Explained variance is measured against
        the observed discounted rewards, not against the critic's own (bootstrapped) targets."""
        responses, values, mean = experience.responses, experience.extra["values"], self.ranks.mean
        assert experience.token_rewards is not None
        to_go = partial(reward_to_go, gamma=self.gamma)
        (returns,) = row_wise(
            lambda _, mask, rewards: to_go(rewards, mask), experience.lengths, experience.token_rewards
        )  # [N]
        explained = explained_variance(values, returns, responses, mean=mean, largest=self.ranks.largest)
        return {
            **experience_metrics(experience, rollout, self.policy_loss, self.ranks),
            "critic/explained_variance": explained.item(),
            "critic/value": mean(values, responses).item(),
            "critic/return": mean(experience.extra["returns"], responses).item(),
        }

    def export(self, folder: Path | str, *, keep_earlier: bool = True) -> Path:
        """Write the policy to ``folder`` and the critic to ``critic`` beside it, both as Hugging Face folders."""
        written = super().export(folder, keep_earlier=keep_earlier)
        beside = Path(folder).with_name("critic")
        export_folder(self.critic.model, self.tokenizer, beside, self.critic_source, keep_earlier=keep_earlier)
        return written

    def export_names(self, folder: Path) -> tuple[Path, ...]:
        return (*super().export_names(folder), folder.with_name("critic"))

    def check_packing(self) -> None:
        super().check_packing()
        self.critic.check_packing()

    @property
    def source_folders(self) -> tuple[Path, ...]:
        return (*super().source_folders, *local_folders(self.critic_source))
