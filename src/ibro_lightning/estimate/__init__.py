"""What a run will need, before it is run: memory per rank, arithmetic per iteration."""

from ibro_lightning.estimate.dry_run import EstimateOptions, add_arguments, dry_run
from ibro_lightning.estimate.generation import EngineMemory, engine_memory
from ibro_lightning.estimate.layout import GIB, Layout
from ibro_lightning.estimate.memory import MemoryEstimate, estimate_memory
from ibro_lightning.estimate.networks import NetworkMemory
from ibro_lightning.estimate.shapes import Shapes

__all__ = [
    "GIB",
    "EngineMemory",
    "EstimateOptions",
    "Layout",
    "MemoryEstimate",
    "NetworkMemory",
    "Shapes",
    "add_arguments",
    "dry_run",
    "engine_memory",
    "estimate_memory",
]
