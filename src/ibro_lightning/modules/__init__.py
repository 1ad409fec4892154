"""LightningModules: the loop and the algorithms."""

from ibro_lightning.modules.actor import ActorModule
from ibro_lightning.modules.base import PolicyModule
from ibro_lightning.modules.dapo import DAPOModule
from ibro_lightning.modules.ppo import PPOModule
from ibro_lightning.modules.reference import ReferenceKL
from ibro_lightning.modules.sft import SFTModule

__all__ = ["ActorModule", "DAPOModule", "PPOModule", "PolicyModule", "ReferenceKL", "SFTModule"]
