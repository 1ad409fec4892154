"""Self-contained tasks with exact verifiers: the number path (learned in minutes on a CPU) and countdown."""

from ibro_lightning.tasks.countdown import Countdown
from ibro_lightning.tasks.number_path import NumberPath
from ibro_lightning.tasks.split import Split, in_split

__all__ = ["Countdown", "NumberPath", "Split", "in_split"]
