"""Wrong answers of the same form as a gold, which a verifier must reject if it can use the gold."""

from __future__ import annotations

import re
from collections.abc import Sequence

_WORDS = re.compile(r"\\(?:text|mathrm|mbox|begin|end|operatorname)\s*\{[^{}]*\}")
_COMMAND = re.compile(r"\\[A-Za-z]+|\\.")
_NUMBER = re.compile(r"[0-9]+(?:\.[0-9]+)?|\.[0-9]+")
_NUMBER_ALONE = re.compile(r"[-+−]?(?:\\?\$)?([0-9]+(?:\.[0-9]+)?|\.[0-9]+)")
_SUBSCRIPT = re.compile(r"_\s*(?:\{[^{}]*\}|[0-9A-Za-z])")


def perturbed(gold: str, *, subscripts: bool = True, letters: bool = True) -> Sequence[str]:
    r"""Answers of the same form with another value.

    A number alone gets another last digit. Otherwise there is one answer each with another first number, another last
    number and another first letter; without a number, with another last letter; and in an equation, with another sign
    before the last ``=``.

    Args:
        gold: text or LaTeX.
        subscripts: whether numbers in subscripts count; these may be bases of numbers.
        letters: whether letters count besides numbers; those of units need not.

    >>> perturbed("1/2"), perturbed("3:30"), perturbed(r"\frac{\pi}{4}"), perturbed(r"\text{Evelyn}")
    (('2/2', '1/3'), ('4:30', '3:40'), ('\\frac{\\pi}{5}',), ('\\text{Fvelyn}', '\\text{Evelyo}'))
    >>> perturbed("y - 2x = 3"), perturbed("120.5"), perturbed(".0000672")
    (('y - 3x = 3', 'y - 2x = 4', 'z - 2x = 3', 'y + 2x = 3'), ('120.6',), ('.0000673',))
    >>> perturbed("204_5", subscripts=False), perturbed(r"\infty")
    (('304_5',), ('7',))
    """
    if alone := _NUMBER_ALONE.fullmatch(gold):
        return (_raised(gold, alone.end(1) - 1 - (gold[alone.end(1) - 1] == ".")),)
    plain = _blanked(_COMMAND, gold)
    if not subscripts:
        plain = _blanked(_SUBSCRIPT, plain)
    numbers, found = list(_NUMBER.finditer(plain)), list(re.finditer(r"[A-Za-z]", plain))
    others = [_raised(gold, _leading_place(number)) for number in (*numbers[:1], *numbers[-1:])]
    if letters or not numbers:
        others += [_raised(gold, letter.start()) for letter in (*found[:1], *([] if numbers else found[-1:]))]
    if sign := re.search(r"[-+](?=.*=)", plain, re.DOTALL):
        others.append(gold[: sign.start()] + "-+"[sign[0] == "-"] + gold[sign.end() :])
    return tuple(dict.fromkeys(others)) or ("7",)


_OTHER_UNITS = {
    "cm": "km", "mm": "km", "km": "m", "m": "km", "inches": "feet", "feet": "inches", "miles": "feet", "kg": "g",
    "hours": "minutes", "minutes": "hours", "seconds": "hours", "days": "weeks", "years": "days", "grams": "kilograms",
    "dollars": "cents", "cents": "dollars", "degrees": "radians", "pounds": "ounces", "gallons": "pints",
}  # fmt: skip
_UNIT = re.compile(r"(?<=[0-9}~ {])(" + "|".join(_OTHER_UNITS) + r")(?![A-Za-z])")
_PERCENT = re.compile(r"\\?%$")
_INTERVAL = re.compile(r"(\\left\s*)?([\[(])([^\[\](){}]*,[^\[\](){}]*)(\\right\s*)?([\])])")
_LETTER = re.compile(r"(?<![A-Za-z\\])[A-Za-z](?![A-Za-z])")


def with_another_meaning(gold: str, *, units: bool = True, names: bool = True) -> Sequence[str]:
    r"""The gold with another unit, another bracket at an interval, or a letter in the other case: what a verifier that
    compares digits alone lets pass.

    Args:
        units: whether units count.
        names: whether the case of letters counts; those of a formula, not of one letter alone.

    >>> with_another_meaning(r"5\text{ cm}"), with_another_meaning("[0,5)"), with_another_meaning(r"\pi r^2")
    (('5\\text{ km}',), ('(0,5)',), ('\\pi R^2',))
    """
    others = []
    if units and (unit := _UNIT.search(gold)):
        others.append(gold[: unit.start()] + _OTHER_UNITS[unit[1]] + gold[unit.end() :])
    if units and _PERCENT.search(gold):
        others.append(_PERCENT.sub(lambda _: r"\text{ cm}", gold))
    if (
        (interval := _INTERVAL.fullmatch(gold))
        and interval[2] + interval[5] != "()"
        and interval[2] + interval[5] != "[]"
    ):
        place = interval.start(2)
        others.append(gold[:place] + "[("[gold[place] == "["] + gold[place + 1 :])
    plain = _blanked(_COMMAND, _blanked(_WORDS, gold))
    if names and len(gold) > 1 and (letter := _LETTER.search(plain)):
        others.append(gold[: letter.start()] + letter[0].swapcase() + gold[letter.end() :])
    return tuple(others)


def _blanked(pattern: re.Pattern[str], text: str) -> str:
    return pattern.sub(lambda match: " " * len(match[0]), text)


def _leading_place(number: re.Match[str]) -> int:
    """The position of the first digit other than 0, which even a verifier that rounds must see."""
    leading = len(number[0]) - len(number[0].lstrip("0."))
    return number.start() + min(leading, len(number[0]) - 1)


def _raised(text: str, place: int) -> str:
    """``text`` with the next digit or letter at this position."""
    old = text[place]
    new = str(int(old) % 9 + 1) if old.isdigit() else chr(ord(old) + (-1 if old in "zZ" else 1))
    return text[:place] + new + text[place + 1 :]
