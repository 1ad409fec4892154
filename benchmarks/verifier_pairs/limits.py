"""An inequality whose bound has a unit, and kinds of pairs of it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction

from verifier_pairs.condition_forms import OTHER_STRICTNESS, SIGNS, TURNED, around
from verifier_pairs.forms import UNITS, quantity
from verifier_pairs.own_kinds import Answer, Point, decimal, exact, right, wrong


@dataclass(frozen=True)
class Limit:
    r"""``x < 5 \\text{ cm}``; x stands for how many of the dimension's first unit it is."""

    sign: str
    value: Fraction
    unit: str

    @property
    def text(self) -> str:
        return f"x {SIGNS[self.sign]} {quantity(self.value, self.unit)}"

    @property
    def meaning(self) -> str:
        dimension, factor, _ = UNITS[self.unit]
        return f"(bool(x {self.sign} {exact(self.value * factor)}), '{dimension}')"

    @property
    def points(self) -> tuple[Point, ...]:
        return around(self.value * UNITS[self.unit][1])


@right(Limit)
def limit_in_another_unit(gold: Limit) -> Iterator[Answer]:
    dimension, factor, _ = UNITS[gold.unit]
    for unit, (kind, size, _) in UNITS.items():
        if kind == dimension and unit != gold.unit and decimal(gold.value * factor / size, 4):
            other = Limit(gold.sign, gold.value * factor / size, unit)
            yield other.text, other.meaning


@right(Limit)
def limit_on_the_left(gold: Limit) -> Iterator[Answer]:
    yield f"{quantity(gold.value, gold.unit)} {SIGNS[TURNED[gold.sign]]} x", gold.meaning


@wrong(Limit)
def limit_of_another_unit(gold: Limit) -> Iterator[Answer]:
    for unit in ("m", "min", "g", "km/h"):
        other = Limit(gold.sign, gold.value, unit)
        if UNITS[unit][:2] != UNITS[gold.unit][:2]:
            yield other.text, other.meaning


@wrong(Limit)
def limit_turned_or_weakened(gold: Limit) -> Iterator[Answer]:
    for sign in (TURNED[gold.sign], OTHER_STRICTNESS[gold.sign]):
        yield Limit(sign, gold.value, gold.unit).text, Limit(sign, gold.value, gold.unit).meaning


@wrong(Limit)
def limit_itself(gold: Limit) -> Iterator[Answer]:
    dimension, factor, _ = UNITS[gold.unit]
    yield quantity(gold.value, gold.unit), f"(bool(x == {exact(gold.value * factor)}), '{dimension}')"
