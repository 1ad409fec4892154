"""Golds sorted by their looks, with the value of those that are numbers: by regular expressions, no parser."""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

_INTEGER = re.compile(r"-?[0-9]+")
_GROUPED = re.compile(r"(-?[0-9]{1,3}(?:(?:,|,\\!|\{,\})[0-9]{3})+)(\.[0-9]+)?")
_DECIMAL = re.compile(r"-?[0-9]*\.[0-9]+")
_FRACTION = re.compile(r"(-?)(?:\\[dt]?frac\{(-?[0-9]+)\}\{([0-9]+)\}|([0-9]+)/([0-9]+))")
_NUMBER = r"(?:-?(?:[0-9]+(?:\.[0-9]+)?|\\[dt]?frac\{[0-9]+\}\{[0-9]+\}|[0-9]+/[0-9]+))"
_END = rf"(?:{_NUMBER}|-?\\infty)"
_TUPLE = re.compile(rf"\(\s*{_NUMBER}(?:\s*,\s*{_NUMBER})+\s*\)")
_INTERVAL = re.compile(rf"[\[(]\s*{_END}\s*,\s*{_END}\s*[\])]")
_UNION = re.compile(rf"{_INTERVAL.pattern}(?:\s*\\cup\s*{_INTERVAL.pattern})+")
_LIST = re.compile(rf"{_NUMBER}(?:\s*,\s*{_NUMBER})+")
_WORD = re.compile(r"\{?(?:\\text\{)?([A-Za-z][A-Za-z ]{2,})\}*")
# A sum of terms of symbols with whole coefficients, or a product of such sums: enough for most answers with symbols.
_POLYNOMIAL = re.compile(r"(?=.*[a-hj-zA-Z])[-+0-9a-hj-zA-Z^{}() ]+")


@dataclass(frozen=True)
class Gold:
    """``kind``: integer, fraction, decimal, tuple, interval, union, list, word, polynomial, other."""

    text: str
    kind: str
    value: Fraction | None = None


def looked_at(text: str) -> Gold:
    """
    >>> looked_at("-12").kind, looked_at(r"\\frac{3}{4}").value, looked_at("2x^2+1").kind, looked_at("(1,2)").kind
    ('integer', Fraction(3, 4), 'polynomial', 'tuple')
    """
    plain = text.strip().replace(r"\left", "").replace(r"\right", "")
    if grouped := _GROUPED.fullmatch(plain):
        digits = re.sub(r"[^0-9-]", "", grouped[1]) + (grouped[2] or "")
        return Gold(text, "decimal" if grouped[2] else "integer", Fraction(digits))
    if _INTEGER.fullmatch(plain):
        return Gold(text, "integer", Fraction(plain))
    if fraction := _FRACTION.fullmatch(plain):
        top, bottom = (fraction[2], fraction[3]) if fraction[2] else (fraction[4], fraction[5])
        value = Fraction(int(top), int(bottom))
        return Gold(text, "fraction", -value if fraction[1] else value)
    if _DECIMAL.fullmatch(plain):
        return Gold(text, "decimal", Fraction(plain))
    for kind, pattern in (("union", _UNION), ("tuple", _TUPLE), ("interval", _INTERVAL), ("list", _LIST)):
        if pattern.fullmatch(plain):
            return Gold(text, kind)
    if _WORD.fullmatch(plain):
        return Gold(text, "word")
    if _POLYNOMIAL.fullmatch(plain) and balanced(plain) and len(plain) > 1:
        return Gold(text, "polynomial")
    return Gold(text, "other")


def balanced(text: str) -> bool:
    depth = 0
    for letter in text:
        depth += (letter in "({") - (letter in ")}")
        if depth < 0:
            return False
    return depth == 0


def parts(text: str, separators: str) -> list[str]:
    """``text`` cut at each separator outside brackets, which begins the next part."""
    found, depth = [""], 0
    for place, letter in enumerate(text):
        if depth == 0 and letter in separators and place and text[place - 1] not in "^{(":
            found.append("")
        found[-1] += letter
        depth += (letter in "({[") - (letter in ")}]")
    return found
