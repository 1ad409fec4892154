"""DAPO (arXiv 2503.14476), top to bottom, with an entropy regulariser of one's choice; and its critic-free relatives.

What is elsewhere: dynamic sampling chooses prompts, so it is the rollout datamodule's; soft overlong punishment is a
reward (``OverlongPenalty``); the clipped loss, the token mean over the whole step and the regulariser's term are in
:mod:`.actor`. What is left out, as in the paper: a critic, and (unless ``kl`` is set) a KL penalty to a reference.

The relatives are options of the same module: GRPO has equal clips and a KL, Dr.GRPO ``advantage: dr_grpo`` with
``aggregation: seq-mean-token-sum-norm``, RLOO ``advantage: rloo``, REINFORCE++ ``advantage: reinforce++`` with a KL in
the reward, GSPO ``surrogate: gspo`` with ``aggregation: seq-mean-token-mean``, CISPO ``surrogate: cispo``.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal, get_args

from torch import Tensor

from ibro_lightning.errors import ConfigError
from ibro_lightning.experience import Experience
from ibro_lightning.functional import (
    dr_grpo_advantages,
    group_advantages,
    reward_to_go,
    rloo_advantages,
)
from ibro_lightning.models import PolicySource
from ibro_lightning.modules.actor import ActorModule
from ibro_lightning.types import Rollout

AdvantageEstimator = Literal["grpo", "dr_grpo", "rloo", "reinforce++"]
GROUP_RELATIVE = {"grpo": group_advantages, "dr_grpo": dr_grpo_advantages, "rloo": rloo_advantages}


class DAPOModule(ActorModule):
    """Group-relative advantages, clip-higher, dual clip, token-mean loss; no critic.

    Args:
        policy: a Hugging Face folder or hub name, or a :class:`PolicySource`.
        advantage: ``grpo``: reward less the group's mean, over its standard deviation (DAPO too); ``dr_grpo``: not
            divided; ``rloo``: less the mean of the others; ``reinforce++``: reward to go, whitened over the rollout,
            which needs no groups.
        actor_settings: regularizer, clip_ratio_low, mini_batch_prompts, optimizer, …, as in :class:`ActorModule`.
    """

    min_group_size = 2

    def __init__(
        self, policy: str | PolicySource, advantage: AdvantageEstimator = "grpo", **actor_settings: Any
    ) -> None:
        super().__init__(policy, **actor_settings)
        if advantage not in get_args(AdvantageEstimator):
            raise ConfigError("model.advantage", advantage, f"write one of {', '.join(get_args(AdvantageEstimator))}")
        self.advantage = advantage
        if advantage not in GROUP_RELATIVE:
            self.min_group_size = 1

    @property
    def advantages_need_scores(self) -> bool:  # type: ignore[override]
        """Not ours, but perhaps those of a subclass."""
        ours = type(self).prepare is DAPOModule.prepare and type(self).advantages is DAPOModule.advantages
        return not ours

    def prepare(self, rollout: Rollout) -> Experience:
        experience = self.score_rollout(rollout)
        return replace(experience, advantages=self.advantages(experience))

    def advantages(self, experience: Experience) -> Tensor:
        """``[B, T]``."""
        rewards, responses = experience.extra["token_rewards"], experience.sequences.response_mask
        if self.advantage in GROUP_RELATIVE:
            per_response = GROUP_RELATIVE[self.advantage](rewards.sum(dim=1), experience.groups)
            return per_response[:, None].expand(rewards.shape)
        return self.whiten(reward_to_go(rewards, responses), experience.mask)
