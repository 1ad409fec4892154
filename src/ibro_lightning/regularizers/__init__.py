"""Entropy regularisers and related methods, one small class each, chosen in YAML by ``class_path``."""

from ibro_lightning.regularizers.attributed_ib import (
    PassRateInformationBottleneck,
    PositionCentredInformationBottleneck,
)
from ibro_lightning.regularizers.base import EntropyRegularizer, PolicyLossMethod, StepContext
from ibro_lightning.regularizers.coefficients import AdaptiveClip, EntropySteps
from ibro_lightning.regularizers.conditional_entropy_shaping import ConditionalEntropyShaping
from ibro_lightning.regularizers.covariance import ClipCov, KLCov
from ibro_lightning.regularizers.entropy_bonus import EntropyBonus
from ibro_lightning.regularizers.entropy_ratio import EntropyRatioClip
from ibro_lightning.regularizers.head_bonuses import AEnt, RenyiBonus
from ibro_lightning.regularizers.hindsight import HindsightTemplate
from ibro_lightning.regularizers.ibro import IBRO
from ibro_lightning.regularizers.information_bottleneck import (
    CorrectPathEntropySuppression,
    InformationBottleneck,
    OppositeInformationBottleneck,
)
from ibro_lightning.regularizers.marginal_entropy import MarginalEntropy
from ibro_lightning.regularizers.none import NoRegularizer
from ibro_lightning.regularizers.sample_weights import EntroPIC, PositiveAdvantageWeight
from ibro_lightning.regularizers.self_distillation import SelfDistillation
from ibro_lightning.regularizers.shaped_advantage import EntropyShapedAdvantage
from ibro_lightning.regularizers.siren import SIREN
from ibro_lightning.regularizers.steer import STEER
from ibro_lightning.regularizers.top_entropy import TopEntropyTokens

__all__ = [
    "IBRO",
    "SIREN",
    "STEER",
    "AEnt",
    "AdaptiveClip",
    "ClipCov",
    "ConditionalEntropyShaping",
    "CorrectPathEntropySuppression",
    "EntroPIC",
    "EntropyBonus",
    "EntropyRatioClip",
    "EntropyRegularizer",
    "EntropyShapedAdvantage",
    "EntropySteps",
    "HindsightTemplate",
    "InformationBottleneck",
    "KLCov",
    "MarginalEntropy",
    "NoRegularizer",
    "OppositeInformationBottleneck",
    "PassRateInformationBottleneck",
    "PolicyLossMethod",
    "PositionCentredInformationBottleneck",
    "PositiveAdvantageWeight",
    "RenyiBonus",
    "SelfDistillation",
    "StepContext",
    "TopEntropyTokens",
]
