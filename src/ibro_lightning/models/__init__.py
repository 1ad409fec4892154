"""The policy and the critic: loading, sharding, scoring, exporting."""

from ibro_lightning.models.building import build_critic, build_policy
from ibro_lightning.models.compiled import compile_in_place
from ibro_lightning.models.critic import Critic
from ibro_lightning.models.gradients import clip_gradients, grad_norm
from ibro_lightning.models.hf_folder import export_folder
from ibro_lightning.models.in_memory import ModelPolicy
from ibro_lightning.models.loading import PolicyOptions, PolicySource, check_same_vocabulary
from ibro_lightning.models.lora import LoRAOptions
from ibro_lightning.models.policy import Policy
from ibro_lightning.models.policy_like import PolicyLike, as_source
from ibro_lightning.models.pretrained import PretrainedPolicy
from ibro_lightning.models.scratch import Qwen2FromScratch
from ibro_lightning.models.sharding import Sharding, full_tensor
from ibro_lightning.models.weight_files import local_part

__all__ = [
    "Critic",
    "LoRAOptions",
    "ModelPolicy",
    "Policy",
    "PolicyLike",
    "PolicyOptions",
    "PolicySource",
    "PretrainedPolicy",
    "Qwen2FromScratch",
    "Sharding",
    "as_source",
    "build_critic",
    "build_policy",
    "check_same_vocabulary",
    "clip_gradients",
    "compile_in_place",
    "export_folder",
    "full_tensor",
    "grad_norm",
    "local_part",
]
