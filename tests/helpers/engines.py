"""Engines as a user would write them, for processes of their own: a process imports this file."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import torch

from ibro_lightning.engines import HFEngine
from ibro_lightning.types import Generation


class Odd(Exception):
    """Cannot be unpickled: its argument is not what it is made of."""

    def __init__(self, number: int) -> None:
        super().__init__(f"number {number}")
        self.number = int(number)


class Told(HFEngine):
    """Does what the first token of the first prompt says.

    Args:
        folder: where it leaves word of what it does.
    """

    WORKS, RAISES, RAISES_ODD, DIES, HANGS = range(5)

    def __init__(self, folder: str) -> None:
        super().__init__()
        self.folder = folder

    def generate(self, prompts, sampling, seeds):
        told = prompts[0][0]
        if told == self.RAISES:
            raise ValueError("as told")
        if told == self.RAISES_ODD:
            raise Odd(3)
        if told == self.DIES:
            os._exit(7)
        if told == self.HANGS:
            Path(self.folder, "hangs").touch()
            threading.Event().wait()
        known = (torch.get_num_threads(), os.getpid())  # told in place of tokens
        return [[Generation(known, (0.0, 0.0), "stop")]]

    def close(self):
        Path(self.folder, "closed").touch()
        super().close()
