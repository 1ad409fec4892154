"""What a person sees. Callbacks read the returned metrics and the rollout; modules know nothing about them."""

from ibro_lightning.callbacks.checkpoint import IterationCheckpoint
from ibro_lightning.callbacks.evaluation_report import EvaluationReport
from ibro_lightning.callbacks.export import ExportModel
from ibro_lightning.callbacks.metrics_log import MetricsLog
from ibro_lightning.callbacks.progress import IterationProgress
from ibro_lightning.callbacks.rollout_log import RolloutLog
from ibro_lightning.callbacks.samples import SamplesTable
from ibro_lightning.callbacks.summary import RunSummary
from ibro_lightning.run_folders import run_folder

__all__ = [
    "EvaluationReport",
    "ExportModel",
    "IterationCheckpoint",
    "IterationProgress",
    "MetricsLog",
    "RolloutLog",
    "RunSummary",
    "SamplesTable",
    "run_folder",
]
