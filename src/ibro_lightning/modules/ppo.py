"""PPO with a critic (arXiv 1707.06347) for language models, top to bottom, with an entropy regulariser of one's choice.

One token is one action, the reward comes with the last one, and the critic estimates the return before every token.
What is elsewhere: the clipped loss and the regulariser's term are in :mod:`.actor`, a KL penalty in :mod:`.reference`.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor

from ibro_lightning.errors import ConfigError, check_at_least
from ibro_lightning.experience import Experience
from ibro_lightning.functional import (
    clipped_value_loss,
    explained_variance,
    gae,
    length_adaptive_lambda,
    reward_to_go,
    token_mean,
)
from ibro_lightning.models import Critic, PolicySource, as_source, build_critic, check_same_vocabulary, export_folder
from ibro_lightning.modules.actor import ActorModule
from ibro_lightning.modules.base import local_folders
from ibro_lightning.modules.batching import losses_of
from ibro_lightning.sequences import Sequences
from ibro_lightning.types import Rollout


class PPOModule(ActorModule):
    """Generalised advantage estimation, whitened advantages, a clipped value loss, a critic with its own optimizer.

    Args:
        policy: a Hugging Face folder or hub name, or a :class:`PolicySource`.
        critic: a folder to start the critic from, a critic's (``critic/`` of an earlier run) or a language model's;
            None takes the policy's own. From a language model, all values start at 0.
        critic_optimizer: called with the critic's parameters; ``warmup_steps`` and ``max_grad_norm`` hold for both.
        gamma: discount per token.
        gae_lambda: λ of the policy's advantages.
        critic_gae_lambda: λ of the critic's returns; None takes ``gae_lambda``. 1 gives unbiased returns (VAPO).
        length_adaptive_alpha: in place of ``gae_lambda``, λ = 1 − 1/(α·length) for each response (VAPO, 0.05).
        value_clip: a value may leave its old one by this much before the loss stops rewarding it; None: no bound.
        whiten_advantages: mean 0 and variance 1 over the rollout's tokens that take part in the loss.
        bootstrap_truncated: a response cut at the length limit goes on with the critic's value instead of with 0.
        critic_warmup_iterations: first iterations in which only the critic learns.
        actor_settings: regularizer, kl, clip_ratio_low, mini_batch_prompts, …, as in :class:`ActorModule`.
    """

    def __init__(
        self,
        policy: str | PolicySource,
        critic: str | None = None,
        critic_optimizer: OptimizerCallable = torch.optim.AdamW,
        gamma: float = 1.0,
        gae_lambda: float = 1.0,
        critic_gae_lambda: float | None = None,
        length_adaptive_alpha: float | None = None,
        value_clip: float | None = 0.5,
        whiten_advantages: bool = True,
        bootstrap_truncated: bool = False,
        critic_warmup_iterations: int = 0,
        **actor_settings: Any,
    ) -> None:
        super().__init__(policy, **actor_settings)
        for name, share in (("gamma", gamma), ("gae_lambda", gae_lambda), ("critic_gae_lambda", critic_gae_lambda)):
            if share is not None and not 0 <= share <= 1:
                raise ConfigError(f"model.{name}", share, "write a number from 0 to 1")
        for name, bound in (("value_clip", value_clip), ("length_adaptive_alpha", length_adaptive_alpha)):
            if bound is not None and not bound > 0:
                raise ConfigError(f"model.{name}", bound, "write a positive number, or null to switch it off")
        check_at_least("model.critic_warmup_iterations", critic_warmup_iterations, 0)
        self.critic_source = self.policy_source
        if critic is not None:
            self.critic_source = as_source(critic, self.policy_options, "model.critic")
            check_same_vocabulary(self.policy_source, self.critic_source, "model.critic")
        self.critic_optimizer_factory = critic_optimizer
        self.gamma, self.gae_lambda, self.critic_gae_lambda = gamma, gae_lambda, critic_gae_lambda
        self.length_adaptive_alpha, self.value_clip = length_adaptive_alpha, value_clip
        self.whiten_advantages, self.bootstrap_truncated = whiten_advantages, bootstrap_truncated
        self.critic_warmup_iterations = critic_warmup_iterations
        self.critic: Critic

    def configure_model(self) -> None:
        super().configure_model()
        if self._trainer is not None and isinstance(strategy := self.trainer.strategy, DDPStrategy):
            # A backward pass goes through one of the two networks; DDP waits for all gradients unless it looks.
            strategy._ddp_kwargs.setdefault("find_unused_parameters", True)
        if not hasattr(self, "critic"):
            self.critic = build_critic(self.critic_source, self.policy_options, self.sharding)

    def configure_optimizers(self) -> Any:
        policy = self.optimizer_for(self.policy, self.optimizer_factory, "model.optimizer")
        critic = self.optimizer_for(self.critic, self.critic_optimizer_factory, "model.critic_optimizer")
        return [policy[0], critic[0]], [policy[1], critic[1]]

    @property
    def advantages_need_scores(self) -> bool:  # type: ignore[override]
        """Not ours, but perhaps those of a subclass."""
        return type(self).prepare is not PPOModule.prepare

    def prepare(self, rollout: Rollout) -> Experience:
        experience = self.score_rollout(rollout)
        responses = experience.sequences.response_mask
        values = self.score_values(experience.sequences)
        ends = experience.sequences.response_lengths
        last_values = values.gather(1, ends[:, None]).squeeze(1) * rollout.truncated
        lam: float | Tensor = self.gae_lambda
        if self.length_adaptive_alpha is not None:
            lam = length_adaptive_lambda(ends, alpha=self.length_adaptive_alpha)
        advantages, returns = gae(
            experience.extra["token_rewards"],
            values[:, :-1],
            responses,
            gamma=self.gamma,
            lam=lam,
            critic_lam=self.gae_lambda if self.critic_gae_lambda is None else self.critic_gae_lambda,
            last_values=last_values if self.bootstrap_truncated else None,
        )
        advantages = self.whiten(advantages, experience.mask) if self.whiten_advantages else advantages
        return replace(experience, advantages=advantages).with_extra(values=values[:, :-1], returns=returns)

    def update(self, step: Experience) -> dict[str, float]:
        """The policy's optimizer step, unless the critic is still warming up, and then the critic's."""
        return {**(super().update(step) if self.trains_policy(step.iteration) else {}), **self.update_critic(step)}

    def trains_policy(self, iteration: int) -> bool:
        return not 0 < iteration <= self.critic_warmup_iterations

    def update_critic(self, step: Experience) -> dict[str, float]:
        metrics = self.accumulate(step, lambda micro, _: self.value_loss(micro))
        # Not through Lightning's wrapper: global_step counts policy updates.
        optimizer: Any = self.optimizers(use_pl_optimizer=False)
        schedulers: Any = self.lr_schedulers()
        done = self.clip_and_step("critic", optimizer[1], schedulers[1], losses_of(metrics), step)
        return {**metrics, **{name.replace("update/", "critic/"): value for name, value in done.items()}}

    def value_loss(self, micro: Experience) -> tuple[Tensor, dict[str, float]]:
        """The critic's loss on a micro-batch, a token mean over the whole step."""
        values = self.critic(micro.sequences)[:, :-1]
        result = clipped_value_loss(values, micro.extra["values"], micro.extra["returns"], clip=self.value_clip)
        loss = token_mean(result.loss, micro.mask, micro.num_tokens)
        clipped = token_mean(result.clipped.float(), micro.mask, micro.num_tokens)
        return loss, {"critic/loss": loss.item(), "critic/clipped": clipped.item()}

    @torch.no_grad()
    def score_values(self, sequences: Sequences) -> Tensor:
        """``[B, T + 1]`` values before each response token and after the last, without gradients."""
        values: Tensor | None = None
        for rows, _ in self.aligned_micro_batches(sequences):
            with self.memory_advice("prepare", micro := sequences.select(rows)):
                some = self.critic(micro)
            if values is None:
                values = some.new_zeros(len(sequences), sequences.max_response_length + 1)
            values[rows, : some.shape[1]] = some
        assert values is not None, "a rollout has rows"
        return values

    def experience_metrics(self, experience: Experience, rollout: Rollout) -> dict[str, float]:
        """Explained variance is measured against the discounted rewards that came, not against the critic's own
        (bootstrapped) targets."""
        responses, values = experience.responses, experience.extra["values"]
        came = reward_to_go(experience.extra["token_rewards"], experience.sequences.response_mask, gamma=self.gamma)
        mean = self.ranks.mean
        return {
            **super().experience_metrics(experience, rollout),
            "critic/explained_variance": explained_variance(
                values, came, responses, mean=mean, largest=self.ranks.largest
            ).item(),
            "critic/value": mean(values, responses).item(),
            "critic/return": mean(experience.extra["returns"], responses).item(),
        }

    def export(self, folder: Path) -> Path:
        """Write the policy to ``folder`` and the critic to ``critic`` beside it, both as Hugging Face folders."""
        export_folder(self.critic.model, self.tokenizer, folder.with_name("critic"))
        return super().export(folder)

    def check_packing(self) -> None:
        super().check_packing()
        self.critic.check_packing()

    @property
    def source_folders(self) -> tuple[Path, ...]:
        return (*super().source_folders, *local_folders(self.critic_source))
