"""A prompt source of given problems."""

from __future__ import annotations

from ibro_lightning.sources import PromptSource
from ibro_lightning.types import Problem


class Listed(PromptSource):
    def __init__(self, *problems: Problem) -> None:
        self.listed = problems

    def problems(self):
        return self.listed
