"""A verifier of the last number in a response's text."""

from __future__ import annotations

import re
from decimal import Context, Decimal
from fractions import Fraction

from ibro_lightning.errors import RewardError
from ibro_lightning.rewards.base import PlainResponses, Verdict, VerifiableReward
from ibro_lightning.rewards.mathematics.gold_text import after_hashes, canonical_gold, gold_texts
from ibro_lightning.types import Completion, Prompt

# A minus sign (hyphen or U+2212) belongs to the number unless it follows a digit, a letter or a bracket: "5-3" ends in
# 3, not in -3. The groups of three digits are for "1,234".
_NUMBER = re.compile(r"(?:(?<![\w)\]])[-−])?(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|(?<!\d)\.\d+)")
# Text that makes a number part of another value: 3/2, 4:30, 2 : 1, \frac{3}{2}, 1.2.3, 2024-05-01, 3^2, 1e5. In "5-3"
# the 3 still counts.
_PART = re.compile(
    r"(?:[0-9][ \t]?[/:⁄]|[0-9] : |[0-9]\}?\s*(?:/|\\over)\s*\{?|\\[dtc]?frac\s*(?:(?:\{[^{}]*\}|[0-9])\s*\{?)?"
    r"|[0-9]\.|[0-9]-[0-9]{1,2}-|[0-9A-Za-z)}][\^_]\{?|[0-9][eE][-+]?)$"
)
_TAIL = 2000
"""Characters at the end of the response that are searched, so that a megabyte of digits costs nothing."""


def last_number(text: str) -> Fraction | None:
    r"""The last number in ``text`` as an exact value; None without one, or if it is part of another value.

    >>> [str(last_number(text)) for text in ("$1,234.50.", "it is 3/2", "at 4:30", r"\frac{1}{2}", "6/3 = 2")]
    ['2469/2', 'None', 'None', 'None', '2']
    """
    end = text[-_TAIL:]
    last = next(iter(list(_NUMBER.finditer(end))[-1:]), None)
    if last is None or _PART.search(end, max(0, last.start() - 40), last.start()):
        return None
    return Fraction(last[0].replace(",", "").replace("−", "-"))


_PLAIN_GOLD = re.compile(r"([-+−]?(?:[0-9]+(?:\.[0-9]+)?|\.[0-9]+))\s*\\?%?")


def gold_number(gold: str) -> Fraction | None:
    r"""The value of a gold that is one plain number, or a worked solution that ends in ``#### number``; None for
    anything else, of which the last number is only a part: ``1/2``, ``3:30``, ``2\pi``, ``(1, 2)``, ``5 or 6``.

    >>> [str(gold_number(gold)) for gold in ("1,234.50", "$-7$", r"\boxed{12}", "50%", "6 * 7 = 42\n#### 42", "1/2")]
    ['2469/2', '-7', '12', '50', '42', 'None']
    """
    found = after_hashes(gold)
    number = _PLAIN_GOLD.fullmatch(canonical_gold(gold if found is None else found))
    return Fraction(number[1].replace("−", "-")) if number else None


class LastNumberReward(VerifiableReward):
    """Right if the last number in the response equals the answer, compared as exact values (``8`` = ``8.0``).

    The answer must be one plain number, or a list of several, any of which is right; others raise RewardError.
    """

    pooled = False  # reads only the end of the response, bounded by construction
    tells_bad_answers = True

    def verify(self, prompt: Prompt, completion: Completion) -> Verdict:
        golds = self._golds(prompt)
        number = last_number(completion.text)
        return Verdict(number in golds, "" if number is None else str(number))

    def plain_responses(self, prompt: Prompt) -> PlainResponses:
        values = self._golds(prompt)
        others = [value + 1 for value in values if value + 1 not in values]
        return PlainResponses(tuple(map(_decimal, values)), tuple(map(_decimal, others)))

    def _golds(self, prompt: Prompt) -> list[Fraction]:
        reason, values = "not a plain number", list[Fraction | None]()
        try:
            values = [gold_number(text) for text in gold_texts(prompt.answer)]
        except ValueError as error:
            reason = str(error)
        if not values or None in values:
            what = f"the answer {str(prompt.answer)[:100]!r} of prompt {prompt.id!r} to compare with: {reason}"
            raise RewardError(f"LastNumberReward finds no number in {what} - MathVerifyReward compares expressions")
        return [value for value in values if value is not None]


def _decimal(value: Fraction) -> str:
    """Exact, without an exponent: a plain number's denominator divides a power of ten."""
    digits = 0
    while (value * 10**digits).denominator != 1:
        digits += 1
    return f"{Decimal(int(value * 10**digits)).scaleb(-digits, Context(prec=10_000)):f}"
