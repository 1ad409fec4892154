"""LightningModules: the loop and the algorithms."""

from ibro_lightning.modules.actor import ActorModule
from ibro_lightning.modules.base import PolicyModule
from ibro_lightning.modules.dapo import DAPOModule
from ibro_lightning.modules.sft import SFTModule

__all__ = ["ActorModule", "DAPOModule", "PolicyModule", "SFTModule"]
