r"""Gold answers as text: the content of ``\boxed{}``, and one canonical spelling of plain numbers.

Published files spell the same answer as ``27``, ``27.0``, ``$27$``, ``\boxed{27}``, ``027`` or ``27^\circ``. Rewards
that compare text (the published DAPO rule among them) need one spelling, and so do comparisons of two files.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from decimal import Decimal
from numbers import Integral, Real
from typing import Any

BOX = re.compile(r"\\(?:boxed|fbox)\s*\{")
_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)  # "\{" is a character in LaTeX, not the beginning of a group

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
_QUOTED = r"""(?:"(?:[^"\\]|\\.)*"|'(?:[^'\\]|\\.)*')"""
_LISTED_TEXTS = re.compile(
    rf"\[\s*{_QUOTED}\s*(?:(?:,\s*)?{_QUOTED}\s*)*(?:,\s*)?\]"
    rf"|\(\s*{_QUOTED}\s*,\s*(?:{_QUOTED}\s*,\s*)*(?:{_QUOTED}\s*)?\)",
    re.DOTALL,
)
_ONE_NUMBER = r"([-+−]?(?:[0-9]+(?:\.[0-9]+)?|\.[0-9]+)(?:[eE][-+]?[0-9]+)?)\.?"
_LISTED_NUMBER = re.compile(rf"\[\s*{_ONE_NUMBER}\s*(?:,\s*)?\]|\(\s*{_ONE_NUMBER}\s*,\s*\)")
_ESCAPE = re.compile(
    r"\\(?:[\"'\\/]|n(?![A-Za-z]))"
    r"|(?P<codes>(?:\\u[0-9a-fA-F]{4})+|\\x[0-9a-fA-F]{2}|\\U[0-9a-fA-F]{8})"
)
_DELIMITERS = (("$$", "$$"), ("$", "$"), (r"\(", r"\)"), (r"\[", r"\]"))


def boxed(text: str) -> str | None:
    r"""The content of the last ``\boxed{...}`` or ``\fbox{...}``, in linear time; None without one, or if it is not
    closed.

    >>> boxed(r"first \boxed{1}, then \boxed{\frac{1}{2}}.")
    '\\frac{1}{2}'
    >>> boxed(r"\boxed{1} and \boxed{2")
    """
    start = None
    for opening in BOX.finditer(text):
        start = opening.end()
    end = None if start is None else closing_brace(text, start)
    return text[start:end] if end is not None else None


def closing_brace(text: str, start: int) -> int | None:
    """The index of the brace that closes the group begun just before ``start``."""
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
    """The rest of the last line that begins with ``####``, as in GSM8K's solutions; None without one.

    >>> after_hashes("48 + 24 = 72 clips\\n#### 72")
    '72'
    """
    start = text.rfind("\n####") + 1
    if start == 0 and not text.startswith("####"):
        return None
    return text[start:].split("\n", 1)[0].removeprefix("####").strip()


def canonical_gold(answer: str | int | float | Decimal) -> str:
    r"""The stored form of a gold answer; idempotent. The rules, each with an example:

    - white space, math delimiters, a box and a trailing period around the whole answer are removed:

      >>> [canonical_gold(a) for a in (" $7$. ", r"\(x+1\)", r"$$\frac{1}{2}$$", r"$\boxed{12}$.")]
      ['7', 'x+1', '\\frac{1}{2}', '12']

    - a plain number loses its degree sign, its currency sign, its thousands separators, a plus sign, leading zeros, and
      decimals that are all zero:

      >>> [canonical_gold(a) for a in (r"336^\circ", "90°", r"\$32,\!348", "1,234", "+5", "033", "27.0", "-3.00", "-0")]
      ['336', '90', '32348', '1234', '5', '33', '27', '-3', '0']

    - a fraction in degrees loses its degree sign:

      >>> canonical_gold(r"\frac{45}{2}^{\circ}")
      '\\frac{45}{2}'

    - numbers of JSON and parquet are written out without an exponent:

      >>> [canonical_gold(a) for a in (27, 27.0, 0.5, 1e-7)]
      ['27', '27', '0.5', '0.0000001']

    - everything else is unchanged, including lists, words and symbolic LaTeX:

      >>> [canonical_gold(a) for a in ("1,2,3", r"\left( 3, \frac{\pi}{2} \right)", r"\sin 30^\circ", "5 p.m.", "0.50")]
      ['1,2,3', '\\left( 3, \\frac{\\pi}{2} \\right)', '\\sin 30^\\circ', '5 p.m.', '0.50']
    """
    if isinstance(answer, bool):
        return str(answer)
    if isinstance(answer, float | Decimal):
        if not math.isfinite(answer):
            raise ValueError(f"{answer} is no answer")
        answer = format(Decimal(repr(float(answer))) if isinstance(answer, float) else answer, "f")
    text = str(answer)
    while (shorter := _number(_unwrapped(text.strip()))) != text:
        text = shorter
    return text


def alternatives(answer: Any) -> list[Any]:
    r"""The answers that a gold allows, each of which is right.

    A list is a choice: each element is an answer, and a list of one is its element. The same holds for text that spells
    a list of texts, as JSON, Python or numpy writes it, or of one number: ``[12]`` is no interval. An answer that needs
    several values at once is one text, "1, 2"; and text such as ``[1, 2]`` is an interval or a point, and is
    unchanged. Backslashes in such lists are LaTeX's: ``["\\frac12"]`` and ``["\frac12"]`` both keep one.

    >>> alternatives("12"), alternatives(["12"]), alternatives('["12", "12.0"]'), alternatives("['1/2']")
    (['12'], ['12'], ['12', '12.0'], ['1/2'])
    >>> alternatives("[1, 2]"), alternatives([0.5, "1/2"])
    (['[1, 2]'], [0.5, '1/2'])
    """
    listed = answer if isinstance(answer, list | tuple) else _listed_texts(answer)
    return list(listed) if listed is not None else [answer]


def _listed_texts(answer: Any) -> list[str] | None:
    r"""The texts of ``["…", "…"]`` as JSON, Python or numpy (no commas) writes them, also of ``("…", "…")``; or the one
    number in ``[12]``, which is no interval. None for everything else.

    A backslash is LaTeX's, so that an unescaped ``["\frac{1}{2}"]`` keeps it, unless it escapes a quote or a backslash,
    or spells a character by its code, or a line break that no letter follows.
    """
    if not isinstance(answer, str):
        return None
    text = answer.strip()
    if number := _LISTED_NUMBER.fullmatch(text):
        return [number[1] or number[2]]
    if not _LISTED_TEXTS.fullmatch(text):
        return None
    return [_ESCAPE.sub(_unescaped, quoted[0][1:-1]) for quoted in re.finditer(_QUOTED, text, re.DOTALL)]


def _unescaped(escape: re.Match[str]) -> str:
    if code := escape["codes"]:
        units = [int(unit, 16) for unit in re.findall(r"[0-9a-fA-F]+", code)]
        return "".join(map(chr, units)).encode("utf-16", "surrogatepass").decode("utf-16", "surrogatepass")
    return "\n" if escape[0] == r"\n" else escape[0][1]


def gold_texts(answer: Any) -> list[str]:
    """A gold as the texts of its :func:`alternatives`, numbers as :func:`canonical_gold` writes them.

    >>> gold_texts(12.0), gold_texts(1e20), gold_texts(["7", 7.5])
    (['12'], ['100000000000000000000'], ['7', '7.5'])
    """
    texts = []
    for gold in alternatives(answer):
        if isinstance(gold, str):
            text = gold
        elif isinstance(gold, bool):
            text = str(gold)
        elif isinstance(gold, Integral):
            text = str(int(gold))
        elif isinstance(gold, Decimal | float):
            text = canonical_gold(gold)
        elif isinstance(gold, Real):  # a fraction, or a numpy number
            text = str(gold)
        else:
            raise ValueError(f"{_named(gold)} is no answer: it should be a text or a number")
        if not text.strip():
            raise ValueError("it is empty")
        texts.append(text)
    if not texts:
        raise ValueError("it is an empty list")
    return texts


def _named(value: Any) -> str:
    if value is None:
        return "nothing (null)"
    return f"a {'list in a list' if isinstance(value, Sequence) else type(value).__name__}"


def _unwrapped(text: str) -> str:
    """``text`` without one layer of math delimiters, box or trailing period."""
    for opening, closing in _DELIMITERS:
        if text.startswith(opening) and text.endswith(closing) and len(text) >= len(opening) + len(closing):
            inside = text[len(opening) : len(text) - len(closing)]
            # "$a$ and $b$" is not one formula; "\$" is a character.
            if not any(mark in inside.replace(r"\$", "") for mark in {"$", opening, closing}) and inside[-1:] != "\\":
                return inside
    if (box := BOX.match(text)) and closing_brace(text, box.end()) == len(text) - 1:
        return text[box.end() : -1]
    if text.endswith(".") and not (text.endswith(("..", r"\right.", r"\left.")) or _ABBREVIATION.search(text[-20:])):
        return text[:-1]
    return text


def _number(text: str) -> str:
    """A plain number in its canonical spelling; anything else unchanged."""
    if fraction := _FRACTION_IN_DEGREES.fullmatch(text):
        return fraction[1]
    number = _PLAIN_NUMBER.fullmatch(text)
    if number is None:
        return text
    whole = _SEPARATOR.sub("", number["whole"]).lstrip("0") or "0"
    decimals = number["decimals"] or ""
    value = whole + (f".{decimals}" if decimals.strip("0") else "")
    return f"-{value}" if number["sign"] in ("-", "−") and value != "0" else value
