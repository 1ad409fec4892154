"""The policy and the critic: loading, scoring, exporting."""

from ibro_lightning.models.critic import Critic
from ibro_lightning.models.loading import (
    PolicyOptions,
    PolicySource,
    PretrainedPolicy,
    Qwen2FromScratch,
    as_source,
    check_same_vocabulary,
)
from ibro_lightning.models.policy import Policy, export_folder

__all__ = [
    "Critic",
    "Policy",
    "PolicyOptions",
    "PolicySource",
    "PretrainedPolicy",
    "Qwen2FromScratch",
    "as_source",
    "check_same_vocabulary",
    "export_folder",
]
