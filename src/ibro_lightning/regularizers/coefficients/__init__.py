"""Numbers of a method that may move during training: weights, clip ratios, coefficients of entropy terms and of KL
penalties. Each is one small class: :class:`Constant`, a schedule, or a controller that follows a measurement."""

from ibro_lightning.regularizers.coefficients.base import Coefficient, Constant, TrackedNumber, as_coefficient, moving
from ibro_lightning.regularizers.coefficients.bounded import BoundedSetting
from ibro_lightning.regularizers.coefficients.controllers import (
    AdaptiveClip,
    AdaptiveKL,
    EntropyBand,
    EntropySteps,
    TargetEntropy,
)
from ibro_lightning.regularizers.coefficients.schedules import Cosine, Linear, Schedule, Stages

__all__ = [
    "AdaptiveClip",
    "AdaptiveKL",
    "BoundedSetting",
    "Coefficient",
    "Constant",
    "Cosine",
    "EntropyBand",
    "EntropySteps",
    "Linear",
    "Schedule",
    "Stages",
    "TargetEntropy",
    "TrackedNumber",
    "as_coefficient",
    "moving",
]
