"""Verifiers that read a response's text: the last number in it, and countdown expressions."""

from __future__ import annotations

import re
from fractions import Fraction

from ibro_lightning.errors import RewardError
from ibro_lightning.responses import Completion, Prompt
from ibro_lightning.rewards.base import Verdict, VerifiableReward
from ibro_lightning.tasks import Countdown

# A minus sign (hyphen or U+2212) belongs to the number unless it follows a digit, a letter or a bracket: "5-3" ends in
# 3, not in -3. The groups of three digits are for "1,234".
_NUMBER = re.compile(r"(?:(?<![\w)\]])[-−])?(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|(?<!\d)\.\d+)")
_TAIL = 2000
"""Characters of the response that are searched, so that a megabyte of digits costs nothing."""


def last_number(text: str) -> Fraction | None:
    """The last number in ``text`` as an exact value, or None. ``$1,234.50.`` → 1234.5."""
    matches = _NUMBER.findall(text[-_TAIL:])
    return Fraction(matches[-1].replace(",", "").replace("−", "-")) if matches else None


class LastNumberReward(VerifiableReward):
    """Right if the last number in the response equals the answer, compared as exact values (``8`` = ``8.0``)."""

    pooled = False  # reads the response's end only, bounded by construction
    tells_bad_answers = True

    def verify(self, prompt: Prompt, completion: Completion) -> Verdict:
        gold = last_number(str(prompt.answer))
        if gold is None:
            raise RewardError(
                f"data.reward: LastNumberReward finds no number in the answer {prompt.answer!r} of prompt {prompt.id!r}"
            )
        number = last_number(completion.text)
        return Verdict(number == gold, "" if number is None else str(number))


class CountdownReward(VerifiableReward):
    """Right if the last ``<answer>…</answer>`` is an expression of the given numbers that equals the target.

    ``prompt.answer`` holds ``{numbers, target}``. An equation such as ``<answer>3 * 4 = 12</answer>`` is judged by its
    left side.

    Args:
        use_all: every number must be used exactly once; otherwise at most once.
    """

    pooled = False  # its parser bounds length and depth

    def __init__(self, use_all: bool = True, correct: float = 1.0, incorrect: float = -1.0) -> None:
        super().__init__(correct, incorrect)
        self.task = Countdown(use_all)

    def verify(self, prompt: Prompt, completion: Completion) -> Verdict:
        _, opening, rest = completion.text.rpartition("<answer>")
        expression, closing, _ = rest.partition("</answer>")
        if not opening or not closing:
            return Verdict(0.0, "")
        expression = expression.split("=")[0]
        right = self.task.verify(expression, prompt.answer["numbers"], prompt.answer["target"])
        return Verdict(right, "".join(expression[:200].split()))
