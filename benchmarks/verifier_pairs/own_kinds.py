r"""Kinds of pairs of our own golds (``own_golds.py``): what a kind is, and how the pairs of all kinds are made.

A gold says what it means as an expression of Python, and at which points that is looked at: ``x < 5`` with x = 4, 5, 6.
A kind makes answers from the parts of a gold, with their meaning as another such expression. From the meanings,
``checks.py`` confirms each label, by sympy and by no verifier.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from fractions import Fraction
from typing import Any, Protocol, TypeVar

Point = Mapping[str, int | Fraction]
Answer = tuple[str, str]
"""The text of an answer and its meaning; "" where no expression says it, as of a word."""


class Own(Protocol):
    """A gold of our own: its text in LaTeX, its meaning, and the points at which meanings are compared."""

    @property
    def text(self) -> str: ...
    @property
    def meaning(self) -> str: ...
    @property
    def points(self) -> tuple[Point, ...]: ...


Maker = Callable[[Any], Iterator[Answer]]
G = TypeVar("G")
KINDS: dict[tuple[bool, str], tuple[type, Maker]] = {}


def _kind(same: bool, of: type[G]) -> Callable[[Callable[[G], Iterator[Answer]]], Maker]:
    def add(maker: Callable[[G], Iterator[Answer]]) -> Maker:
        name = f"{of.__name__.lower()}: {maker.__name__.replace('_', ' ').strip()}"
        assert (same, name) not in KINDS, name
        KINDS[same, name] = (of, maker)
        return maker

    return add


def right(of: type[G]) -> Callable[[Callable[[G], Iterator[Answer]]], Maker]:
    """Registers a kind of other writings of golds of a class."""
    return _kind(True, of)


def wrong(of: type[G]) -> Callable[[Callable[[G], Iterator[Answer]]], Maker]:
    """Registers a kind of near-misses of golds of a class."""
    return _kind(False, of)


def exact(value: int | Fraction) -> str:
    """A rational number as an expression.

    >>> exact(Fraction(3, 4)), exact(-5)
    ('rational(3, 4)', 'rational(-5, 1)')
    """
    return f"rational({Fraction(value).numerator}, {Fraction(value).denominator})"


def decimal(value: int | Fraction, most: int = 6) -> str | None:
    """A number as a decimal that says it exactly, with at most so many places; None where there is none.

    >>> decimal(Fraction(5, 2)), decimal(-300), decimal(Fraction(-1, 20)), decimal(Fraction(1, 3))
    ('2.5', '-300', '-0.05', None)
    """
    value = Fraction(value)
    places = next((n for n in range(most + 1) if (value * 10**n).denominator == 1), None)
    if places is None:
        return None
    digits = str(abs(int(value * 10**places))).rjust(places + 1, "0")
    cut = len(digits) - places
    return "-" * (value < 0) + digits[:cut] + f".{digits[cut:]}" * bool(places)


def latex(value: int | Fraction) -> str:
    r"""A whole number, or else a fraction of LaTeX.

    >>> latex(Fraction(-3, 4)), latex(7)
    ('-\\frac{3}{4}', '7')
    """
    top, bottom = Fraction(value).numerator, Fraction(value).denominator
    return str(top) if bottom == 1 else rf"{'-' * (top < 0)}\frac{{{abs(top)}}}{{{bottom}}}"


def number(value: int | Fraction) -> str:
    """A decimal where one says it exactly, or else a fraction."""
    return decimal(value) or latex(value)
