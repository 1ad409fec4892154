"""LightningModules: DAPO and its relatives, PPO, supervised fine-tuning."""

from ibro_lightning.modules.dapo import DAPOModule
from ibro_lightning.modules.policy_module import PolicyModule
from ibro_lightning.modules.ppo import PPOModule
from ibro_lightning.modules.provider import PolicyProviderMixin
from ibro_lightning.modules.sft import SFTModule

__all__ = ["DAPOModule", "PPOModule", "PolicyModule", "PolicyProviderMixin", "SFTModule"]
