"""Sums of two numbers."""

from __future__ import annotations

from collections.abc import Iterator

from ibro_lightning.errors import ConfigError
from ibro_lightning.sources.base import PromptSource, as_prompt, check_template
from ibro_lightning.tasks.split import Split, check_split, in_split
from ibro_lightning.types import Problem


class SumsSource(PromptSource):
    """Every sum of two numbers with a given number of digits: the smallest task for a chat model.

    Args:
        digits: of each number; 1 gives the 100 sums 0 + 0 … 9 + 9.
        template: with ``{a}`` and ``{b}``.
        split, heldout_fraction: by a hash of the sum.
        chat: wrap the prompt as a user message for the model's chat template.
    """

    def __init__(
        self,
        digits: int = 1,
        template: str = "What is {a} + {b}? Answer with the number only.",
        split: Split = "all",
        heldout_fraction: float = 0.2,
        chat: bool = True,
    ) -> None:
        check_split(split, heldout_fraction)
        if digits not in (1, 2, 3) or isinstance(digits, bool):
            raise ConfigError("digits", digits, "write 1, 2 or 3")
        check_template("template", template, ("a", "b"))
        self.numbers = range(0 if digits == 1 else 10 ** (digits - 1), 10**digits)
        self.template, self.split, self.heldout_fraction, self.chat = template, split, heldout_fraction, chat

    def problems(self) -> Iterator[Problem]:
        for a in self.numbers:
            for b in self.numbers:
                if in_split(f"{a}+{b}", self.split, self.heldout_fraction):
                    text = self.template.format(a=a, b=b)
                    yield Problem(f"{a}+{b}", as_prompt(text, chat=self.chat), str(a + b), own_text=(text,))
