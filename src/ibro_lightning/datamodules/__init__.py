"""LightningDataModules for rollouts, demonstrations and evaluations."""

from ibro_lightning.datamodules.collector import Collector
from ibro_lightning.datamodules.demonstrations import SFTDataModule
from ibro_lightning.datamodules.dynamic_sampling import DynamicSampling
from ibro_lightning.datamodules.eval_sets import EvalSet
from ibro_lightning.datamodules.evaluation import EvaluationDataModule
from ibro_lightning.datamodules.rollout import RolloutDataModule

__all__ = ["Collector", "DynamicSampling", "EvalSet", "EvaluationDataModule", "RolloutDataModule", "SFTDataModule"]
