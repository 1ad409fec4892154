"""Sources of problems and demonstrations, and their encoding as prompts.

Modules that need torch or file-reading libraries are imported lazily: reward workers import the tasks, and with them
this package, but need neither.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from ibro_lightning.sources.base import DemonstrationSource, PromptSource
from ibro_lightning.sources.contamination import Overlap, overlaps
from ibro_lightning.sources.curriculum import Curriculum, DifficultyPools
from ibro_lightning.sources.mixture import MixturePart, MixtureSource
from ibro_lightning.sources.prompt_templates import TEMPLATES, bare_question
from ibro_lightning.sources.solved_problems import SolvedProblems

if TYPE_CHECKING:
    from ibro_lightning.sources.dataset import DatasetSource, SourceReport
    from ibro_lightning.sources.pass_rates import PassRates
    from ibro_lightning.sources.prompts import PromptCursor, PromptLimits, encode_prompts

__all__ = [
    "TEMPLATES",
    "Curriculum",
    "DatasetSource",
    "DemonstrationSource",
    "DifficultyPools",
    "MixturePart",
    "MixtureSource",
    "Overlap",
    "PassRates",
    "PromptCursor",
    "PromptLimits",
    "PromptSource",
    "SolvedProblems",
    "SourceReport",
    "bare_question",
    "encode_prompts",
    "overlaps",
]
_LAZY = dict.fromkeys(("DatasetSource", "SourceReport"), "dataset")
_LAZY["PassRates"] = "pass_rates"
_LAZY |= dict.fromkeys(("PromptCursor", "PromptLimits", "encode_prompts"), "prompts")


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(f"{__name__}.{_LAZY[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
