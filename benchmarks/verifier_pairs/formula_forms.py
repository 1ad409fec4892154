r"""Forms of our own golds with symbols: formulas, powers, functions with a constant, antiderivatives."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction

from verifier_pairs.own_kinds import Point, exact, number

PRIMES = (7, 11, 13, 17, 19, 23, 29, 31)


@dataclass(frozen=True)
class Product:
    """A coefficient and powers of letters: ``above`` over ``below``, each with letters and their exponents."""

    coefficient: Fraction
    above: tuple[tuple[str, int], ...]
    below: tuple[tuple[str, int], ...] = ()

    @property
    def text(self) -> str:
        return product(self.coefficient, self.above, self.below)

    @property
    def meaning(self) -> str:
        return product_meaning(self.coefficient, self.above, self.below)

    @property
    def points(self) -> tuple[Point, ...]:
        names = [*{name for name, _ in self.above + self.below}]
        names = sorted({*names, *(name.swapcase() for name in names)})
        values = [Fraction(prime, 3) for prime in PRIMES * 2]
        first = dict(zip(names, values, strict=False))
        return (
            first,
            {name: 1 / value for name, value in first.items()},
            {name: value + 2 for name, value in first.items()},
        )


Powers = tuple[tuple[str, int], ...]


def powers(letters: Powers) -> str:
    return "".join(name if power == 1 else f"{name}^{power}" for name, power in letters)


def product(coefficient: Fraction, above: Powers, below: Powers = ()) -> str:
    top, bottom = coefficient.numerator, coefficient.denominator
    if not below:
        return ("" if coefficient == 1 else "-" if coefficient == -1 else number(coefficient)) + powers(above)
    sign, top = "-" * (top < 0), abs(top)
    numerator = ("" if top == 1 and above else str(top)) + powers(above)
    return rf"{sign}\frac{{{numerator}}}{{{'' if bottom == 1 else bottom}{powers(below)}}}"


def product_meaning(coefficient: Fraction, above: Powers, below: Powers = ()) -> str:
    factors = [f"{name}**{power}" for name, power in above] + [f"{name}**-{power}" for name, power in below]
    return " * ".join([exact(coefficient), *factors])


@dataclass(frozen=True)
class Difference:
    r"""Of two symbols of one letter and both cases, in a formula: ``\pi(R^2-r^2)h``; ``frame`` has @ for it."""

    frame: str
    frame_meaning: str
    large: str
    power: int

    @property
    def text(self) -> str:
        return self.frame.replace("@", f"{self.of(self.large)}-{self.of(self.large.lower())}")

    def of(self, letter: str) -> str:
        return letter if self.power == 1 else f"{letter}^{self.power}"

    @property
    def meaning(self) -> str:
        return self.means(f"{self.large}**{self.power} - {self.large.lower()}**{self.power}")

    def means(self, inside: str) -> str:
        return self.frame_meaning.replace("@", f"({inside})")

    @property
    def points(self) -> tuple[Point, ...]:
        others = {"h": 3, "a": 5, "b": 11}
        return tuple({**others, self.large: x, self.large.lower(): y} for x, y in ((7, 2), (5, 3), (Fraction(9, 2), 4)))


@dataclass(frozen=True)
class Power:
    """A whole number or letter to a sum of whole numbers' symbols: ``(-1)^{m+n}``."""

    base: str
    summands: tuple[str, ...]

    @property
    def text(self) -> str:
        return self.writing(self.summands)

    def writing(self, summands: tuple[str, ...], base: str | None = None) -> str:
        return f"{base or self.base}^{{{''.join(summands).removeprefix('+')}}}"

    @property
    def meaning(self) -> str:
        return self.means(self.summands)

    def means(self, summands: tuple[str, ...], base: str | None = None) -> str:
        return f"{'exp(1)' if (base or self.base) == 'e' else base or self.base}**({''.join(summands)})"

    @property
    def points(self) -> tuple[Point, ...]:
        return tuple({"m": m, "n": n, "k": m + 1, "q": 7} for m in (2, 3, 6) for n in (1, 2, 5))


@dataclass(frozen=True)
class Bounded:
    r"""A function of a whole number and a constant: ``\gcd(n, 360)``, ``\max(n, 5000)``, ``|n - 5000|``."""

    function: str
    constant: int

    @property
    def text(self) -> str:
        return TEXTS[self.function].format("n", self.constant)

    @property
    def meaning(self) -> str:
        return MEANINGS[self.function].format("n", self.constant)

    @property
    def points(self) -> tuple[Point, ...]:
        c = self.constant
        steps = (c - 1, c, c + 1, 2 * c - 1, 2 * c, 2 * c + 1, 2 * c + 2, c * (c + 1), 10 * c - 1, 10 * c, 12 * c)
        return tuple({"n": n} for n in (0, 1, 6, *steps))


TEXTS = {
    "gcd": r"\gcd({}, {})",
    "lcm": r"\operatorname{{lcm}}({}, {})",
    "min": r"\min({}, {})",
    "max": r"\max({}, {})",
    "abs": "|{} - {}|",
    "floor": r"\left\lfloor \frac{{{}}}{{{}}} \right\rfloor",
}
MEANINGS = {
    "gcd": "gcd({}, {})",
    "lcm": "lcm({}, {})",
    "min": "Min({}, {})",
    "max": "Max({}, {})",
    "abs": "Abs({} - {})",
    "floor": "{} // {}",
}


@dataclass(frozen=True)
class Antiderivative:
    """A sum of terms and a constant that is free, by the terms' texts and meanings."""

    terms: tuple[tuple[str, str], ...]

    @property
    def text(self) -> str:
        return f"{plus(text for text, _ in self.terms)} + C"

    @property
    def meaning(self) -> str:
        return self.means(f"{' + '.join(meaning for _, meaning in self.terms)}")

    @staticmethod
    def means(function: str) -> str:
        """Its derivative says what it is, as the constant is free."""
        return f"slope(lambda x: {function}, x)"

    @property
    def points(self) -> tuple[Point, ...]:
        return tuple({"x": x, "C": 5} for x in (1, 2, Fraction(7, 3)))


def plus(terms: Iterable[str]) -> str:
    """Terms added; one that begins with a minus sign is subtracted.

    >>> plus(["x^3", "- 2x", "C"])
    'x^3 - 2x + C'
    """
    first, *others = terms
    return "".join([first, *(f" {term}" if term.startswith("-") else f" + {term}" for term in others)])
