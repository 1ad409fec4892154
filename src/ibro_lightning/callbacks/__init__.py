"""Reports, logs and files of a run. Callbacks read the returned metrics and the rollout; modules do not know them."""

from ibro_lightning.callbacks.alarms import Alarms
from ibro_lightning.callbacks.checkpoint import IterationCheckpoint
from ibro_lightning.callbacks.evaluation_report import EvaluationReport
from ibro_lightning.callbacks.export_model import ExportModel
from ibro_lightning.callbacks.heartbeat import Heartbeat
from ibro_lightning.callbacks.information_plane import InformationPlane
from ibro_lightning.callbacks.interruptions import Interruptions
from ibro_lightning.callbacks.metrics_log import MetricsLog
from ibro_lightning.callbacks.overview import TensorBoardOverview
from ibro_lightning.callbacks.progress import IterationProgress
from ibro_lightning.callbacks.rank_watch import RankWatch
from ibro_lightning.callbacks.rollout_log import RolloutLog
from ibro_lightning.callbacks.samples import SamplesTable
from ibro_lightning.callbacks.summary import RunSummary
from ibro_lightning.runs.folder import run_folder

__all__ = [
    "Alarms",
    "EvaluationReport",
    "ExportModel",
    "Heartbeat",
    "InformationPlane",
    "Interruptions",
    "IterationCheckpoint",
    "IterationProgress",
    "MetricsLog",
    "RankWatch",
    "RolloutLog",
    "RunSummary",
    "SamplesTable",
    "TensorBoardOverview",
    "run_folder",
]
