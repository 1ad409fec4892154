r"""Forms of our own golds: quantities, numbers of other kinds, matrices, words. Each gold is given by its parts and not
by its text, so that what is made of it needs no parser."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

from verifier_pairs.own_kinds import Point, exact, number

NOWHERE: tuple[Point, ...] = ({},)
"""The points of what has no symbols."""

# Unit: its dimension, how many of that dimension's first unit it is (exactly, by definition), and its word.
UNITS: dict[str, tuple[str, Fraction, str]] = {
    "m": ("length", Fraction(1), "meters"),
    "cm": ("length", Fraction(1, 100), "centimeters"),
    "mm": ("length", Fraction(1, 1000), "millimeters"),
    "km": ("length", Fraction(1000), "kilometers"),
    "ft": ("length", Fraction(3048, 10000), "feet"),
    "in": ("length", Fraction(254, 10000), "inches"),
    "miles": ("length", Fraction(1609344, 1000), "miles"),
    "s": ("time", Fraction(1), "seconds"),
    "min": ("time", Fraction(60), "minutes"),
    "hours": ("time", Fraction(3600), "hours"),
    "days": ("time", Fraction(86400), "days"),
    "weeks": ("time", Fraction(604800), "weeks"),
    "kg": ("mass", Fraction(1), "kilograms"),
    "g": ("mass", Fraction(1, 1000), "grams"),
    "mg": ("mass", Fraction(1, 10**6), "milligrams"),
    "liters": ("volume", Fraction(1), "liters"),
    "ml": ("volume", Fraction(1, 1000), "milliliters"),
    "m/s": ("speed", Fraction(1), "meters per second"),
    "km/h": ("speed", Fraction(1000, 3600), "kilometers per hour"),
    "m^2": ("area", Fraction(1), "square meters"),
    "cm^2": ("area", Fraction(1, 10**4), "square centimeters"),
    "m^3": ("volume", Fraction(1000), "cubic meters"),
    "cm^3": ("volume", Fraction(1, 1000), "cubic centimeters"),
    "mph": ("speed", Fraction(1609344, 3600000), "miles per hour"),
}


@dataclass(frozen=True)
class Quantity:
    """A number and a unit of ``UNITS``."""

    value: Fraction
    unit: str
    points = NOWHERE

    @property
    def text(self) -> str:
        return quantity(self.value, self.unit)

    @property
    def meaning(self) -> str:
        return measured(self.value, self.unit)


def quantity(value: Fraction, unit: str) -> str:
    name, _, power = unit.partition("^")
    return rf"{number(value)} \text{{ {name}}}" + f"^{power}" * bool(power)


def measured(value: Fraction, unit: str) -> str:
    dimension, factor, _ = UNITS[unit]
    return f"({exact(value * factor)}, '{dimension}')"


@dataclass(frozen=True)
class Compound:
    """So many of a larger unit and so many of a smaller one: 2 hours 30 minutes."""

    large: int
    unit: str
    small: int
    part: str
    points = NOWHERE

    @property
    def text(self) -> str:
        return rf"{self.large} \text{{ {UNITS[self.unit][2]} }} {self.small} \text{{ {UNITS[self.part][2]}}}"

    @property
    def meaning(self) -> str:
        return measured(self.in_parts, self.part)

    @property
    def in_parts(self) -> Fraction:
        return self.large * UNITS[self.unit][1] / UNITS[self.part][1] + self.small


@dataclass(frozen=True)
class Money:
    cents: int
    points = NOWHERE

    @property
    def amount(self) -> str:
        return f"{self.cents // 100}.{self.cents % 100:02d}" if self.cents % 100 else str(self.cents // 100)

    @property
    def text(self) -> str:
        return rf"\${self.amount}"

    @property
    def meaning(self) -> str:
        return f"({exact(self.cents)}, 'cents')"


@dataclass(frozen=True)
class Temperature:
    celsius: Fraction
    points = NOWHERE

    @property
    def text(self) -> str:
        return rf"{number(self.celsius)}^\circ\text{{C}}"

    @property
    def meaning(self) -> str:
        return f"({exact(self.celsius)} + rational(27315, 100), 'kelvin')"


@dataclass(frozen=True)
class Angle:
    degrees: int
    points = NOWHERE

    @property
    def text(self) -> str:
        return rf"{self.degrees}^\circ"

    @property
    def meaning(self) -> str:
        return f"({exact(Fraction(self.degrees, 180))} * pi, 'number')"


@dataclass(frozen=True)
class Percent:
    """So many hundredths."""

    value: Fraction
    points = NOWHERE

    @property
    def text(self) -> str:
        return rf"{number(self.value)}\%"

    @property
    def meaning(self) -> str:
        return f"({exact(self.value / 100)}, 'number')"


@dataclass(frozen=True)
class Clock:
    """A time of day, by its minute of the day, written with 12 hours."""

    minute: int
    points = NOWHERE

    @property
    def hands(self) -> str:
        return f"{(self.minute // 60 - 1) % 12 + 1}:{self.minute % 60:02d}"

    @property
    def half(self) -> str:
        return "AM" if self.minute < 720 else "PM"

    @property
    def text(self) -> str:
        return rf"{self.hands} \text{{ {self.half}}}"

    @property
    def meaning(self) -> str:
        return f"({self.minute}, 'minute of the day')"


@dataclass(frozen=True)
class Ratio:
    entries: tuple[int, ...]
    points = NOWHERE

    @property
    def text(self) -> str:
        return ":".join(map(str, self.entries))

    @property
    def meaning(self) -> str:
        return proportion(self.entries)


def proportion(entries: tuple[int, ...]) -> str:
    return f"({', '.join(exact(Fraction(entry, entries[0])) for entry in entries)})"


@dataclass(frozen=True)
class Complex:
    real: int
    imaginary: int
    points = NOWHERE

    @property
    def text(self) -> str:
        return rectangular(self.real, self.imaginary)

    @property
    def meaning(self) -> str:
        return f"{self.real} + {self.imaginary} * unit"


def rectangular(real: int, imaginary: int) -> str:
    """``a+bi`` as one writes it."""
    factor = {1: "", -1: "-"}.get(imaginary, str(imaginary))
    return f"{real}{'+' * (imaginary > 0)}{factor}i" if real else f"{factor}i"


@dataclass(frozen=True)
class Numeral:
    """Digits in a base, as an answer to a question for that base."""

    digits: str
    base: int
    points = NOWHERE

    @property
    def text(self) -> str:
        return f"{self.digits}_{{{self.base}}}"

    @property
    def meaning(self) -> str:
        return f"(int('{self.digits}', {self.base}), {self.base})"


@dataclass(frozen=True)
class Matrix:
    rows: tuple[tuple[int, ...], ...]
    points = NOWHERE

    @property
    def text(self) -> str:
        return grid(self.rows)

    @property
    def meaning(self) -> str:
        return str(self.rows)


@dataclass(frozen=True)
class Vector:
    entries: tuple[int, ...]
    points = NOWHERE

    @property
    def text(self) -> str:
        return grid(tuple((entry,) for entry in self.entries))

    @property
    def meaning(self) -> str:
        return str(self.entries)


def grid(rows: tuple[tuple[int | str, ...], ...], name: str = "pmatrix") -> str:
    """A matrix in LaTeX."""
    return rf"\begin{{{name}}} " + r" \\ ".join(" & ".join(map(str, row)) for row in rows) + rf" \end{{{name}}}"


@dataclass(frozen=True)
class Assignment:
    """Values of several letters: ``x = 3, y = 5``."""

    values: tuple[tuple[str, int], ...]
    points = NOWHERE

    @property
    def text(self) -> str:
        return ", ".join(f"{name} = {value}" for name, value in self.values)

    @property
    def meaning(self) -> str:
        return str(tuple(sorted(self.values)))


@dataclass(frozen=True)
class Word:
    """A word or name, and another one of the same sort."""

    text: str
    other: str
    meaning = ""
    points = NOWHERE

    @property
    def word(self) -> str:
        return self.text.removeprefix(r"\text{").removesuffix("}")

    @property
    def opposite(self) -> str:
        return self.other.removeprefix(r"\text{").removesuffix("}")
