r"""Forms of our own golds with symbols: inequalities, congruences, equations."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

from verifier_pairs.own_kinds import Point, exact, number

SIGNS = {"<": "<", "<=": r"\le", ">": ">", ">=": r"\ge"}
TURNED = {"<": ">", "<=": ">=", ">": "<", ">=": "<="}
OTHER_STRICTNESS = {"<": "<=", "<=": "<", ">": ">=", ">=": ">"}


def around(*bounds: Fraction) -> tuple[Point, ...]:
    """Each bound, points closely beside it, between bounds and far away."""
    near = [Fraction(1, 10**12), Fraction(1, 2), Fraction(1), Fraction(10**12)]
    found = {bound + step * sign for bound in bounds for step in near for sign in (-1, 1)}
    found |= set(bounds) | {-bound for bound in bounds} | {bound / 10 for bound in bounds} | {Fraction(0)}
    found |= {(first + second) / 2 for first in bounds for second in bounds}
    return tuple({"x": value} for value in sorted(found))


@dataclass(frozen=True)
class Inequality:
    """``x < 5000``."""

    sign: str
    bound: Fraction

    @property
    def text(self) -> str:
        return f"x {SIGNS[self.sign]} {number(self.bound)}"

    @property
    def meaning(self) -> str:
        return f"x {self.sign} {exact(self.bound)}"

    @property
    def points(self) -> tuple[Point, ...]:
        return around(self.bound)


@dataclass(frozen=True)
class Between:
    """``low < x <= high``, as a chain."""

    low: Fraction
    sign: str
    second: str
    high: Fraction

    @property
    def text(self) -> str:
        return f"{number(self.low)} {SIGNS[self.sign]} x {SIGNS[self.second]} {number(self.high)}"

    @property
    def meaning(self) -> str:
        return between(self.low, self.sign, self.second, self.high)

    @property
    def points(self) -> tuple[Point, ...]:
        return around(self.low, self.high)


def between(low: Fraction, sign: str, second: str, high: Fraction) -> str:
    return f"bool({exact(low)} {sign} x) and bool(x {second} {exact(high)})"


@dataclass(frozen=True)
class Outside:
    """Two rays: ``(-\\infty, low) \\cup [high, \\infty)``; ``sign`` and ``second`` say which ends belong to it."""

    low: Fraction
    sign: str
    second: str
    high: Fraction

    @property
    def text(self) -> str:
        left, right = ")" if self.sign == "<" else "]", "(" if self.second == ">" else "["
        return rf"(-\infty, {number(self.low)}{left} \cup {right}{number(self.high)}, \infty)"

    @property
    def meaning(self) -> str:
        return outside(self.low, self.sign, self.second, self.high)

    @property
    def points(self) -> tuple[Point, ...]:
        return around(self.low, self.high)


def outside(low: Fraction, sign: str, second: str, high: Fraction) -> str:
    return f"bool(x {sign} {exact(low)}) or bool(x {second} {exact(high)})"


@dataclass(frozen=True)
class Congruence:
    residue: int
    modulus: int

    @property
    def text(self) -> str:
        return rf"x \equiv {self.residue} \pmod{{{self.modulus}}}"

    @property
    def meaning(self) -> str:
        return f"x % {self.modulus} == {self.residue % self.modulus}"

    @property
    def points(self) -> tuple[Point, ...]:
        return tuple({"x": self.residue + step} for step in (*range(-15, 16), self.modulus, 5 * self.modulus))


@dataclass(frozen=True)
class Line:
    """``ax + by = c`` with whole numbers."""

    a: int
    b: int
    c: int

    @property
    def text(self) -> str:
        return f"{linear(self.a, self.b)} = {self.c}"

    @property
    def meaning(self) -> str:
        return f"{self.a} * x + {self.b} * y == {self.c}"

    @property
    def points(self) -> tuple[Point, ...]:
        on = [(Fraction(x), Fraction(self.c - self.a * x, self.b)) for x in range(-3, 4)]
        beside = [(Fraction(x), Fraction(y)) for x in (-2, 0, 5) for y in (-7, 0, 3)]
        return tuple({"x": x, "y": y} for x, y in [*on, *((y, x) for x, y in on), *beside])


def linear(a: int, b: int, names: str = "xy") -> str:
    """``ax + by`` as one writes it."""
    first, second = ({1: "", -1: "-"}.get(value, str(value)) for value in (a, b))
    return f"{first}{names[0]} {'+' if b > 0 else '-'} {second.removeprefix('-')}{names[1]}"


@dataclass(frozen=True)
class Circle:
    """Around (h, k) with a whole radius."""

    h: int
    k: int
    radius: int

    @property
    def text(self) -> str:
        return f"{squares(self.h, self.k)} = {self.radius**2}"

    @property
    def meaning(self) -> str:
        return circle(self.h, self.k, self.radius**2)

    @property
    def points(self) -> tuple[Point, ...]:
        parts: list[tuple[int | Fraction, int | Fraction]] = [
            (1, 0),
            (0, -1),
            (Fraction(3, 5), Fraction(4, 5)),
            (Fraction(-5, 13), Fraction(12, 13)),
            (2, 0),
            (Fraction(1, 2), 0),
        ]
        ends = [(self.h, self.k), (-self.h, self.k), (self.h, -self.k), (self.k, self.h), (0, 0)]
        return tuple({"x": h + self.radius * x, "y": k + self.radius * y} for h, k in ends for x, y in parts)


def circle(h: int, k: int, square: int) -> str:
    return f"(x - ({h}))**2 + (y - ({k}))**2 == {square}"


def squares(h: int, k: int, sign: str = "+") -> str:
    first, second = (
        name if not value else f"({name} {'-' if value > 0 else '+'} {abs(value)})"
        for name, value in (("x", h), ("y", k))
    )
    return f"{first}^2 {sign} {second}^2"


@dataclass(frozen=True)
class Hyperbola:
    """``xy = k``."""

    k: int

    @property
    def text(self) -> str:
        return f"xy = {self.k}"

    @property
    def meaning(self) -> str:
        return f"x * y == {self.k}"

    @property
    def points(self) -> tuple[Point, ...]:
        on = [{"x": x, "y": Fraction(self.k * sign, x)} for x in (-6, -2, 1, 5) for sign in (-1, 1)]
        return (*on, {"x": 1, "y": self.k + 1}, {"x": 0, "y": 0}, {"x": self.k - 1, "y": 1}, {"x": 2, "y": 2 * self.k})
