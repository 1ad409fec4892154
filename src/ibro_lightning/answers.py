r"""Gold answers as text: what is inside ``\boxed{}``, and one canonical spelling of plain numbers.

Published files spell the same answer as ``27``, ``27.0``, ``$27$``, ``\boxed{27}``, ``027`` or ``27^\circ``. Rewards
that compare text (the published DAPO rule among them) need one spelling, and so does anything that asks whether two
files agree.
"""

from __future__ import annotations

import math
import re
from decimal import Decimal

BOX = re.compile(r"\\(?:boxed|fbox)\s*\{")
_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)  # "\{" is a character to LaTeX, not the beginning of a group

# A comma alone, or one of LaTeX's ways to write it without the space of a list: 10,\!080  10{,}080  10\,080
THOUSANDS = r"(?:,(?:\\!\s*)?|\{,\}(?:\\!\s*)?|\\,)"
_NUMBER = (
    rf"(?P<sign>[-+−]?)\s*(?P<whole>[1-9][0-9]{{0,2}}(?:{THOUSANDS}[0-9]{{3}})+|[0-9]+)(?:\.(?P<decimals>[0-9]+))?"
)
_DEGREES = r"\s*(?:\^\s*(?:\\circ|\{\s*\\circ\s*\})|\\degree|°|º)"
_PLAIN_NUMBER = re.compile(rf"(?:\\?\$\s*)?{_NUMBER}(?:{_DEGREES})?")
_FRACTION_IN_DEGREES = re.compile(rf"([-+]?[0-9]*\\[dt]?frac\{{[0-9]+\}}\{{[0-9]+\}}){_DEGREES}")
_SEPARATOR = re.compile(THOUSANDS)
_ABBREVIATION = re.compile(r"(?:[^\W\d_]\.){2,}$")
_DELIMITERS = (("$$", "$$"), ("$", "$"), (r"\(", r"\)"), (r"\[", r"\]"))


def boxed(text: str) -> str | None:
    r"""What the last ``\boxed{...}`` or ``\fbox{...}`` holds; None if there is none, or if it is never closed.

    Takes time in proportion to the text's length, whatever is in it.

    >>> boxed(r"first \boxed{1}, then \boxed{\frac{1}{2}}.")
    '\\frac{1}{2}'
    >>> boxed(r"\boxed{1} and \boxed{2")
    """
    start = None
    for opening in BOX.finditer(text):
        start = opening.end()
    end = None if start is None else _closing(text, start)
    return text[start:end] if end is not None else None


def _closing(text: str, start: int) -> int | None:
    """Where the group that began just before ``start`` is closed."""
    depth = 1
    for brace in _BRACE.finditer(text, start):
        if brace.group() == "{":
            depth += 1
        elif brace.group() == "}":
            depth -= 1
            if depth == 0:
                return brace.start()
    return None


def after_hashes(text: str) -> str | None:
    """What follows ``####`` on the last line that begins with it, as in GSM8K's solutions; None if there is none.

    >>> after_hashes("48 + 24 = 72 clips\\n#### 72")
    '72'
    """
    start = text.rfind("\n####") + 1
    if start == 0 and not text.startswith("####"):
        return None
    return text[start:].split("\n", 1)[0].removeprefix("####").strip()


def canonical_gold(answer: str | int | float | Decimal) -> str:
    r"""How a gold answer is stored. Applying it again changes nothing. The rules, each with an example:

    - white space, math delimiters and a trailing period around the answer go:

      >>> [canonical_gold(a) for a in (" $7$. ", r"\(x+1\)", r"$$\frac{1}{2}$$")]
      ['7', 'x+1', '\\frac{1}{2}']

    - a box around the whole answer goes:

      >>> canonical_gold(r"$\boxed{12}$.")
      '12'

    - a plain number loses its degree sign, its currency sign, its thousands separators, a plus sign, leading zeros, and
      decimals that are all zero:

      >>> [canonical_gold(a) for a in (r"336^\circ", "90°", r"\$32,\!348", "1,234", "+5", "033", "27.0", "-3.00", "-0")]
      ['336', '90', '32348', '1234', '5', '33', '27', '-3', '0']

    - a fraction in degrees loses its sign, too:

      >>> canonical_gold(r"\frac{45}{2}^{\circ}")
      '\\frac{45}{2}'

    - numbers of JSON and parquet are written out without an exponent:

      >>> [canonical_gold(a) for a in (27, 27.0, 0.5, 1e-7)]
      ['27', '27', '0.5', '0.0000001']

    - everything else is left alone, lists, words and symbolic LaTeX among it:

      >>> [canonical_gold(a) for a in ("1,2,3", r"\left( 3, \frac{\pi}{2} \right)", r"\sin 30^\circ", "5 p.m.", "0.50")]
      ['1,2,3', '\\left( 3, \\frac{\\pi}{2} \\right)', '\\sin 30^\\circ', '5 p.m.', '0.50']

    Raises:
        ValueError: a float that is not finite.
    """
    if isinstance(answer, bool):
        return str(answer)
    if isinstance(answer, float | Decimal):
        if not math.isfinite(answer):
            raise ValueError(f"{answer} is no answer")
        answer = format(Decimal(repr(answer)) if isinstance(answer, float) else answer, "f")
    text = str(answer)
    while (shorter := _number(_unwrapped(text.strip()))) != text:
        text = shorter
    return text


def _unwrapped(text: str) -> str:
    """``text`` without one layer of math delimiters, box or trailing period."""
    for opening, closing in _DELIMITERS:
        if text.startswith(opening) and text.endswith(closing) and len(text) >= len(opening) + len(closing):
            inside = text[len(opening) : len(text) - len(closing)]
            # "$a$ and $b$" is not one formula; "\$" is a character.
            if not any(mark in inside.replace(r"\$", "") for mark in {"$", opening, closing}) and inside[-1:] != "\\":
                return inside
    if (box := BOX.match(text)) and _closing(text, box.end()) == len(text) - 1:
        return text[box.end() : -1]
    if text.endswith(".") and not (text.endswith(("..", r"\right.", r"\left.")) or _ABBREVIATION.search(text[-20:])):
        return text[:-1]
    return text


def _number(text: str) -> str:
    """A plain number in its canonical spelling; anything else as it stands."""
    if fraction := _FRACTION_IN_DEGREES.fullmatch(text):
        return fraction[1]
    number = _PLAIN_NUMBER.fullmatch(text)
    if number is None:
        return text
    whole = _SEPARATOR.sub("", number["whole"]).lstrip("0") or "0"
    decimals = number["decimals"] or ""
    value = whole + (f".{decimals}" if decimals.strip("0") else "")
    return f"-{value}" if number["sign"] in ("-", "−") and value != "0" else value
