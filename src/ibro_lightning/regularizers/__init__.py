"""Entropy regularisers, one small class each, chosen in YAML by ``class_path``."""

from ibro_lightning.regularizers.base import EntropyRegularizer
from ibro_lightning.regularizers.entropy_bonus import EntropyBonus
from ibro_lightning.regularizers.information_bottleneck import InformationBottleneck
from ibro_lightning.regularizers.none import NoRegularizer

__all__ = ["EntropyBonus", "EntropyRegularizer", "InformationBottleneck", "NoRegularizer"]
