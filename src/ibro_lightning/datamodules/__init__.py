"""Prompt sources, and the datamodules that turn them into rollouts, demonstrations and evaluations."""

from ibro_lightning.datamodules.collector import Collector
from ibro_lightning.datamodules.contamination import Overlap, overlaps
from ibro_lightning.datamodules.dataset_source import DatasetSource, SourceReport
from ibro_lightning.datamodules.evaluation import EvalSet, EvaluationDataModule
from ibro_lightning.datamodules.gym_source import ReasoningGymSource
from ibro_lightning.datamodules.mixture import MixturePart, MixtureSource
from ibro_lightning.datamodules.prompts import PromptCursor, PromptLimits, encode_prompts
from ibro_lightning.datamodules.rollout import DynamicSampling, RolloutDataModule
from ibro_lightning.datamodules.sft import DemonstrationSource, NumberPathDemonstrations, SFTDataModule
from ibro_lightning.datamodules.sources import CountdownSource, NumberPathSource, PromptSource, SumsSource
from ibro_lightning.datamodules.templates import TEMPLATES, bare_question

__all__ = [
    "TEMPLATES",
    "Collector",
    "CountdownSource",
    "DatasetSource",
    "DemonstrationSource",
    "DynamicSampling",
    "EvalSet",
    "EvaluationDataModule",
    "MixturePart",
    "MixtureSource",
    "NumberPathDemonstrations",
    "NumberPathSource",
    "Overlap",
    "PromptCursor",
    "PromptLimits",
    "PromptSource",
    "ReasoningGymSource",
    "RolloutDataModule",
    "SFTDataModule",
    "SourceReport",
    "SumsSource",
    "bare_question",
    "encode_prompts",
    "overlaps",
]
