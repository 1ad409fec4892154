"""Prompt sources, and the datamodules that turn them into rollouts, demonstrations and evaluations."""

from ibro_lightning.datamodules.collector import Collector
from ibro_lightning.datamodules.dataset_source import DatasetSource
from ibro_lightning.datamodules.evaluation import EvalSet, EvaluationDataModule
from ibro_lightning.datamodules.prompts import PromptCursor, PromptLimits, encode_prompts
from ibro_lightning.datamodules.rollout import DynamicSampling, RolloutDataModule
from ibro_lightning.datamodules.sft import DemonstrationSource, NumberPathDemonstrations, SFTDataModule
from ibro_lightning.datamodules.sources import CountdownSource, NumberPathSource, PromptSource, SumsSource

__all__ = [
    "Collector",
    "CountdownSource",
    "DatasetSource",
    "DemonstrationSource",
    "DynamicSampling",
    "EvalSet",
    "EvaluationDataModule",
    "NumberPathDemonstrations",
    "NumberPathSource",
    "PromptCursor",
    "PromptLimits",
    "PromptSource",
    "RolloutDataModule",
    "SFTDataModule",
    "SumsSource",
    "encode_prompts",
]
