r"""Golds that we write ourselves, of forms that the data's golds have few of or none, and all pairs of them.

Every number here is our own choice. Each gold is given by its parts; ``forms.py`` and ``formula_forms.py`` write it.
"""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction

from verifier_pairs import (
    amount_kinds,
    condition_kinds,
    equation_kinds,
    formula_kinds,
    power_kinds,
    quantity_kinds,
    sentences,
    structure_kinds,
)
from verifier_pairs.condition_forms import Between, Circle, Congruence, Hyperbola, Inequality, Line, Outside
from verifier_pairs.forms import (
    Angle,
    Clock,
    Complex,
    Compound,
    Matrix,
    Money,
    Numeral,
    Percent,
    Quantity,
    Ratio,
    Temperature,
    Vector,
    Word,
)
from verifier_pairs.formula_forms import Antiderivative, Bounded, Difference, Power, Product
from verifier_pairs.golds import Gold
from verifier_pairs.own_kinds import KINDS, Own
from verifier_pairs.pairs import Pair
from verifier_pairs.sentences import Said, Sentence

MODULES = (
    *(amount_kinds, condition_kinds, equation_kinds, formula_kinds, power_kinds, quantity_kinds),
    *(sentences, structure_kinds),
)
"""Importing them fills ``KINDS``."""

F = Fraction

QUANTITIES: list[Own] = [
    *(
        Quantity(F(5), "cm"),
        Quantity(F(12), "km"),
        Quantity(F("2.5"), "m"),
        Quantity(F(84), "in"),
        Quantity(F(6), "ft"),
    ),
    *(Quantity(F(3), "miles"), Quantity(F(45), "min"), Quantity(F(90), "s"), Quantity(F(36), "hours")),
    *(Quantity(F(14), "days"), Quantity(F(750), "g"), Quantity(F("1.2"), "kg"), Quantity(F(250), "ml")),
    *(Quantity(F(8), "liters"), Quantity(F(72), "km/h"), Quantity(F(15), "m/s"), Quantity(F(60), "mph")),
    *(Compound(2, "hours", 30, "min"), Compound(5, "ft", 9, "in"), Compound(3, "weeks", 7, "days")),
    *(Compound(7, "min", 15, "s"), Money(540), Money(1299), Money(75000), Money(7), Money(125050)),
    *(Temperature(F(25)), Temperature(F(-40, 2)), Temperature(F("36.5")), Temperature(F(100))),
    *(Angle(60), Angle(45), Angle(135), Angle(72), Angle(90)),
    *(Percent(F(25)), Percent(F("12.5")), Percent(F(80)), Percent(F(150)), Percent(F("0.4"))),
    *(Clock(15 * 60 + 30), Clock(9 * 60 + 5), Clock(23 * 60 + 45), Clock(11 * 60), Clock(14 * 60 + 10)),
    *(Ratio((2, 3)), Ratio((3, 4, 5)), Ratio((5, 1)), Ratio((9, 16)), Ratio((1, 2, 4))),
]
CONDITIONS: list[Own] = [
    *(Inequality("<", F(5)), Inequality(">", F(-3)), Inequality("<=", F(7, 3)), Inequality(">=", F("0.25"))),
    *(Inequality("<", F(5000)), Inequality(">=", F(1250)), Inequality(">", F(10**9)), Inequality("<=", F(-(10**6)))),
    *(Inequality("<", F("1234.5")), Inequality(">", F(98765)), Inequality("<=", F(2) ** 40), Inequality(">=", F(0))),
    *(Between(F(1), "<", "<=", F(4)), Between(F(-2), "<=", "<", F(9, 2)), Between(F(0), "<", "<", F(10**4))),
    *(Between(F(1000), "<=", "<=", F(2500)), Between(F("0.1"), "<=", "<", F("0.2"))),
    *(Between(F(10**8), "<", "<=", F(10**9)), Outside(F(2), "<", ">", F(3)), Outside(F(-1, 2), "<=", ">", F(6))),
    *(Outside(F(-4000), "<", ">=", F(4000)), Outside(F(0), "<=", ">=", F(10**6))),
    *(Congruence(3, 7), Congruence(5, 12), Congruence(1, 4), Congruence(17, 100), Congruence(250, 1001)),
    *(Line(2, 3, 7), Line(1, -4, 9), Line(5, 2, 0), Line(3, 1, -11), Line(1, 1, 1000), Line(7, -2, 40000)),
    *(Circle(0, 0, 5), Circle(1, -2, 3), Circle(-4, 7, 6), Circle(3, 3, 10)),
    *(Hyperbola(12), Hyperbola(-5), Hyperbola(1000)),
]
FORMULAS: list[Own] = [
    Product(F(1), (("G", 1), ("M", 1), ("m", 1)), (("r", 2),)),
    Product(F(1), (("N", 1), ("k", 1), ("T", 1))),
    Product(F(1), (("P", 1), ("V", 1))),
    Product(F(1), (("n", 1), ("R", 1), ("T", 1)), (("V", 1),)),
    Product(F(1), (("m", 1), ("g", 1), ("h", 1))),
    Product(F(1, 2), (("m", 1), ("v", 2))),
    Product(F(1), (("k", 1), ("q", 1), ("Q", 1)), (("d", 2),)),
    Product(F(1), (("B", 1), ("A", 1), ("b", 1))),
    Product(F(4), (("a", 2), ("b", 1)), (("c", 1),)),
    Product(F(1), (("p", 1), ("V", 1)), (("T", 1),)),
    Product(F(3), (("R", 2), ("r", 1), ("h", 1))),
    Product(F(-2), (("x", 1), ("y", 2), ("z", 1))),
    Product(F(1), (("L", 1),), (("R", 1), ("C", 1))),
    Product(F(1), (("I", 2), ("R", 1))),
    Product(F(1), (("V", 1), ("I", 1), ("t", 1))),
    *(Difference(r"\pi(@)h", "pi * @ * h", "R", 2), Difference(r"\frac{a(@)}{b}", "a * @ / b", "M", 1)),
    *(Difference(r"4(@)h", "4 * @ * h", "S", 2), Difference("b(@)", "b * @", "T", 1)),
    *(
        Power("(-1)", ("m", "+n")),
        Power("(-1)", ("n", "+1")),
        Power("(-1)", ("m", "+n", "+k")),
        Power("2", ("m", "+n")),
    ),
    *(Power("2", ("m", "-n")), Power("(-2)", ("n", "+1")), Power("10", ("-n",)), Power("e", ("m", "-n"))),
    *(Power("3", ("n", "+k")), Power("q", ("m", "-1")), Power("(-3)", ("m", "+n"))),
    *(Bounded("gcd", 360), Bounded("gcd", 1000003), Bounded("gcd", 12), Bounded("lcm", 90), Bounded("lcm", 5040)),
    *(Bounded("min", 250), Bounded("min", 100000), Bounded("max", 5000), Bounded("max", 64), Bounded("abs", 7)),
    *(Bounded("abs", 5000), Bounded("abs", 10**6)),
    *(Antiderivative((("x^3", "x**3"), ("2x", "2*x"))), Antiderivative(((r"\sin x", "sin(x)"),))),
    *(Antiderivative(((r"\frac{x^4}{4}", "x**4 / 4"), ("- x^2", "-x**2"))), Antiderivative((("e^x", "exp(x)"),))),
    Antiderivative(((r"x \ln x", "x * log(x)"), ("- x", "-x"))),
]
STRUCTURES: list[Own] = [
    *(Matrix(((1, 2), (3, 4))), Matrix(((0, -1), (1, 0))), Matrix(((2, 5), (5, 7))), Matrix(((1, 0, 2), (-3, 4, 6)))),
    *(Matrix(((1, 2, 3), (0, 1, 4), (5, 6, 0))), Matrix(((1000, 1), (-1, 250))), Matrix(((8, -3), (0, 12), (7, 1)))),
    *(Vector((1, 2, 3)), Vector((4, -5)), Vector((-7, 0, 2)), Vector((1000, 30, -4)), Vector((3, 8, 9))),
    *(Complex(3, 4), Complex(-2, 5), Complex(1, -1), Complex(0, 7), Complex(12, -5), Complex(1000, 1)),
    *(Numeral("1101", 2), Numeral("52", 8), Numeral("2102", 3), Numeral("3041", 5), Numeral("1B7", 16)),
    *(
        Word("Alice", "Bob"),
        Word("Friday", "Thursday"),
        Word("yes", "no"),
        Word("even", "odd"),
        Word("Paris", "Berlin"),
    ),
    *(Word("increasing", "decreasing"), Word("parabola", "hyperbola"), Word("right triangle", "isosceles triangle")),
    *(Word("true", "false"), Word("Emma Noether", "Emma Watson"), Word("north", "south"), Word("red", "blue")),
]
SENTENCES: list[Own] = [
    *map(Sentence, (F(5), F(12), F(72), F(199), F(4096), F("2.5"), F(16), F(31415))),
    *(
        Said(F(25), "The answer is 5 squared."),
        Said(F(64), "The answer is 4 cubed."),
        Said(F(-5), "The answer is negative 5."),
    ),
    *(
        Said(F(-12), "The answer is minus 12."),
        Said(F(5000000), "The answer is 5 million."),
        Said(F(3000), "It is 3 thousand."),
    ),
    *(
        Said(F(24), "The answer is two dozen."),
        Said(F(7), "The answer is seven."),
        Said(F(1, 2), "The answer is one half."),
    ),
    *(Said(F(8), "The answer is 2 to the power of 3."), Said(F(7), "The answer is the square root of 49.")),
    Said(F(2, 3), "The answer is two thirds."),
]
OWN: list[Own] = [*QUANTITIES, *CONDITIONS, *FORMULAS, *STRUCTURES, *SENTENCES]


def own_pairs(golds: list[Own] | None = None) -> Iterator[Pair]:
    """Every pair of every kind."""
    for own in OWN if golds is None else golds:
        form = type(own).__name__.lower()
        for (same, name), (of, make) in KINDS.items():
            if type(own) is of:
                for answer, meaning in make(own):
                    meant = (own.meaning, meaning, own.points) if meaning and own.meaning else None
                    yield Pair(Gold(own.text, form), answer, same, name, meant=meant, whole=of in (Sentence, Said))
