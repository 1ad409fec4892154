"""DAPO (arXiv 2503.14476), top to bottom, with an entropy regulariser of one's choice.

What is elsewhere: dynamic sampling chooses prompts, so it is the rollout datamodule's; soft overlong punishment is a
reward (``OverlongPenalty``); the token mean over the whole step and the regulariser's term are in :mod:`.actor`.
What is left out, as in the paper: a critic, and a KL penalty to a reference model.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ibro_lightning.errors import ConfigError
from ibro_lightning.functional import clipped_surrogate, group_advantages
from ibro_lightning.models import PolicySource
from ibro_lightning.modules.actor import ActorModule
from ibro_lightning.types import Experience, Rollout, TokenStats


class DAPOModule(ActorModule):
    """Group-relative advantages, clip-higher, dual clip, token-mean loss. Equal clips make it GRPO.

    Args:
        policy: a Hugging Face folder or hub name, or a :class:`PolicySource`.
        clip_ratio_low, clip_ratio_high: the probability ratio is clipped to [1 − low, 1 + high].
        dual_clip: bounds the loss of negative advantages by c·|A|; None switches it off.
        overlong_filter: leave responses that were cut at the length limit out of the loss. Advantages still compare
            with them.
        actor_settings: regularizer, mini_batch_prompts, optimizer, …, as in :class:`ActorModule`.
    """

    min_group_size = 2

    def __init__(
        self,
        policy: str | PolicySource,
        clip_ratio_low: float = 0.2,
        clip_ratio_high: float = 0.28,
        dual_clip: float | None = 10.0,
        overlong_filter: bool = False,
        **actor_settings: Any,
    ) -> None:
        super().__init__(policy, **actor_settings)
        if not 0 < clip_ratio_low < 1:
            raise ConfigError("model.clip_ratio_low", clip_ratio_low, "write a number between 0 and 1, such as 0.2")
        if clip_ratio_high <= 0:
            raise ConfigError("model.clip_ratio_high", clip_ratio_high, "write a positive number, such as 0.28")
        if dual_clip is not None and dual_clip <= 1:
            raise ConfigError(
                "model.dual_clip", dual_clip, "write a number above 1, such as 10, or null to switch it off"
            )
        self.clip_ratio_low, self.clip_ratio_high, self.dual_clip = clip_ratio_low, clip_ratio_high, dual_clip
        self.overlong_filter = overlong_filter

    def prepare(self, rollout: Rollout) -> Experience:
        old_logp, old_entropy = self.score(rollout.sequences, rollout.temperature)
        mask = rollout.sequences.response_mask
        if self.overlong_filter:
            mask = mask & ~rollout.truncated[:, None]
        advantages = group_advantages(rollout.rewards, rollout.groups)
        return Experience(
            sequences=rollout.sequences,
            old_logp=old_logp,
            old_entropy=old_entropy,
            advantages=advantages[:, None].expand(mask.shape),
            mask=mask,
            groups=rollout.groups,
            temperature=rollout.temperature,
        )

    def policy_loss(self, stats: TokenStats) -> tuple[Tensor, dict[str, Tensor]]:
        surrogate = clipped_surrogate(
            stats.logp,
            stats.old_logp,
            stats.advantages,
            clip_ratio_low=self.clip_ratio_low,
            clip_ratio_high=self.clip_ratio_high,
            dual_clip=self.dual_clip,
        )
        return surrogate.loss, {
            "update/clipped_low": surrogate.clipped_low,
            "update/clipped_high": surrogate.clipped_high,
            "update/clipped_dual": surrogate.clipped_dual,
        }
