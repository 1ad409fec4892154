"""Procedural tasks with exact verifiers, one file each: problems, demonstrations and reward.

Reward workers import these modules, which therefore load neither torch nor a task's library.
"""

from ibro_lightning.tasks.alphabet import Alphabet
from ibro_lightning.tasks.countdown import Countdown, CountdownReward, CountdownSource
from ibro_lightning.tasks.number_path import NumberPath, NumberPathDemonstrations, NumberPathReward, NumberPathSource
from ibro_lightning.tasks.reasoning_gym import ReasoningGymReward, ReasoningGymSource
from ibro_lightning.tasks.small_programs import SmallProgramsSource
from ibro_lightning.tasks.split import Split, in_split
from ibro_lightning.tasks.sums import SumsSource

__all__ = [
    "Alphabet",
    "Countdown",
    "CountdownReward",
    "CountdownSource",
    "NumberPath",
    "NumberPathDemonstrations",
    "NumberPathReward",
    "NumberPathSource",
    "ReasoningGymReward",
    "ReasoningGymSource",
    "SmallProgramsSource",
    "Split",
    "SumsSource",
    "in_split",
]
