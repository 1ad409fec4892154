r"""Golds that we write ourselves, of forms that the data's golds have few of or none, and all pairs of them.

Who chose them knew the verifier's documentation and had not read its code; its authors have mended it by them since.
Every number here is our own choice. Each gold is given by its parts; the files of forms write it.
"""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction
from itertools import starmap

from verifier_pairs import (
    amount_kinds,
    condition_kinds,
    equation_kinds,
    formula_kinds,
    limits,
    listed,
    number_kinds,
    power_kinds,
    quantity_kinds,
    sentences,
    structure_kinds,
)
from verifier_pairs.condition_forms import Between, Circle, Congruence, Hyperbola, Inequality, Line, Outside
from verifier_pairs.forms import (
    Angle,
    Assignment,
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
from verifier_pairs.limits import Limit
from verifier_pairs.own_kinds import KINDS, Own
from verifier_pairs.pairs import Pair
from verifier_pairs.sentences import AROUND, Said, Sentence

MODULES = (
    *(
        amount_kinds,
        condition_kinds,
        equation_kinds,
        formula_kinds,
        limits,
        listed,
        number_kinds,
        power_kinds,
        quantity_kinds,
    ),
    *(sentences, structure_kinds),
)
"""Importing them fills ``KINDS``."""

F = Fraction

QUANTITIES: list[Own] = [
    *starmap(Quantity, [(F(5), "cm"), (F(12), "km"), (F("2.5"), "m"), (F(84), "in"), (F(6), "ft"), (F(3), "miles")]),
    *starmap(Quantity, [(F(45), "min"), (F(90), "s"), (F(36), "hours"), (F(14), "days"), (F(750), "g")]),
    *starmap(Quantity, [(F("1.2"), "kg"), (F(250), "ml"), (F(8), "liters"), (F(72), "km/h"), (F(15), "m/s")]),
    *starmap(Quantity, [(F(60), "mph"), (F(24), "cm^2"), (F("1.5"), "m^2"), (F(3), "m^3"), (F(500), "cm^3")]),
    *(Limit("<", F(5), "cm"), Limit(">=", F(90), "s"), Limit(">", F("1.2"), "kg"), Limit("<=", F(60), "mph")),
    *(Compound(2, "hours", 30, "min"), Compound(5, "ft", 9, "in"), Compound(3, "weeks", 7, "days")),
    Compound(7, "min", 15, "s"),
    *map(Money, (540, 1299, 75000, 7, 125050)),
    *map(Temperature, (F(25), F(-20), F("36.5"), F(100))),
    *map(Angle, (60, 45, 135, 72, 90)),
    *map(Percent, (F(25), F("12.5"), F(80), F(150), F("0.4"))),
    *map(Clock, (15 * 60 + 30, 9 * 60 + 5, 23 * 60 + 45, 11 * 60, 14 * 60 + 10)),
    *map(Ratio, ((2, 3), (3, 4, 5), (5, 1), (9, 16), (1, 2, 4))),
]
CONDITIONS: list[Own] = [
    *starmap(Inequality, [("<", F(5)), (">", F(-3)), ("<=", F(7, 3)), (">=", F("0.25")), (">=", F(0))]),
    *starmap(Inequality, [("<", F(5000)), (">=", F(1250)), (">", F(10**9)), ("<=", F(-(10**6))), ("<", F("1234.5"))]),
    *starmap(Inequality, [(">", F(98765)), ("<=", F(2**40)), ("<", F("0.001")), (">", F(1, 360))]),
    *(Between(F(1), "<", "<=", F(4)), Between(F(-2), "<=", "<", F(9, 2)), Between(F(0), "<", "<", F(10**4))),
    *(Between(F(1000), "<=", "<=", F(2500)), Between(F("0.1"), "<=", "<", F("0.2"))),
    *(Between(F(10**8), "<", "<=", F(10**9)), Outside(F(2), "<", ">", F(3)), Outside(F(-1, 2), "<=", ">", F(6))),
    *(Outside(F(-4000), "<", ">=", F(4000)), Outside(F(0), "<=", ">=", F(10**6))),
    *starmap(Congruence, [(3, 7), (5, 12), (1, 4), (17, 100), (250, 1001)]),
    *starmap(Line, [(2, 3, 7), (1, -4, 9), (5, 2, 0), (3, 1, -11), (1, 1, 1000), (7, -2, 40000)]),
    *starmap(Circle, [(0, 0, 5), (1, -2, 3), (-4, 7, 6), (3, 3, 10)]),
    *map(Hyperbola, (12, -5, 1000)),
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
    *starmap(Power, [("(-1)", ("m", "+n")), ("(-1)", ("n", "+1")), ("(-1)", ("m", "+n", "+k")), ("2", ("m", "+n"))]),
    *starmap(Power, [("2", ("m", "-n")), ("(-2)", ("n", "+1")), ("10", ("-n",)), ("e", ("m", "-n"))]),
    *starmap(Power, [("3", ("n", "+k")), ("q", ("m", "-1")), ("(-3)", ("m", "+n"))]),
    *starmap(Bounded, [("gcd", 360), ("gcd", 1000003), ("gcd", 12), ("lcm", 90), ("lcm", 5040), ("min", 250)]),
    *starmap(Bounded, [("min", 100000), ("max", 5000), ("max", 64), ("abs", 7), ("abs", 5000), ("abs", 10**6)]),
    *starmap(Bounded, [("max", 10**9), ("gcd", 2**31 - 1), ("floor", 1000), ("floor", 10**7), ("floor", 24)]),
    Antiderivative((("x^3", "x**3"), ("2x", "2*x"))),
    Antiderivative(((r"\frac{x^4}{4}", "x**4 / 4"), ("- x^2", "-x**2"))),
    Antiderivative(((r"x \ln x", "x * log(x)"), ("- x", "-x"))),
    *(Antiderivative(((r"\sin x", "sin(x)"),)), Antiderivative((("e^x", "exp(x)"),))),
]
STRUCTURES: list[Own] = [
    *(Matrix(((1, 2), (3, 4))), Matrix(((0, -1), (1, 0))), Matrix(((2, 5), (5, 7))), Matrix(((1, 0, 2), (-3, 4, 6)))),
    *(Matrix(((1, 2, 3), (0, 1, 4), (5, 6, 0))), Matrix(((1000, 1), (-1, 250))), Matrix(((8, -3), (0, 12), (7, 1)))),
    *map(Vector, ((1, 2, 3), (4, -5), (-7, 0, 2), (1000, 30, -4), (3, 8, 9))),
    *map(Assignment, ((("x", 3), ("y", 5)), (("a", 2), ("b", -7), ("c", 11)), (("m", 1000), ("n", 999)))),
    *starmap(Complex, [(3, 4), (-2, 5), (1, -1), (0, 7), (12, -5), (1000, 1)]),
    *starmap(Numeral, [("1101", 2), ("52", 8), ("2102", 3), ("3041", 5), ("1B7", 16)]),
    *starmap(Word, [("Alice", "Bob"), ("Friday", "Thursday"), ("yes", "no"), ("even", "odd"), ("Paris", "Berlin")]),
    *starmap(Word, [("increasing", "decreasing"), ("parabola", "hyperbola"), ("true", "false"), ("north", "south")]),
    *(Word("red", "blue"), Word(r"\text{right triangle}", r"\text{isosceles triangle}")),
    *(Word(r"\text{Mary Somerville}", r"\text{Mary Cartwright}"), Word(r"\text{at noon}", r"\text{at midnight}")),
]
SENTENCES: list[Own] = [
    *map(Sentence, (F(5), F(12), F(72), F(199), F(4096), F("2.5"), F(16), F(31415))),
    *(Said(F(25), "The answer is 5 squared."), Said(F(64), "The answer is 4 cubed.")),
    *(Said(F(-5), "The answer is negative 5."), Said(F(-12), "The answer is minus 12.")),
    *(Said(F(5000000), "The answer is 5 million."), Said(F(3000), "It is 3 thousand.")),
    *(Said(F(24), "The answer is two dozen."), Said(F(7), "The answer is seven.")),
    *(Said(F(1, 2), "The answer is one half."), Said(F(2, 3), "The answer is two thirds.")),
    *(Said(F(8), "The answer is 2 to the power of 3."), Said(F(7), "The answer is the square root of 49.")),
]
OWN: list[Own] = [
    *QUANTITIES,
    *CONDITIONS,
    *FORMULAS,
    *STRUCTURES,
    *listed.CLOSED,
    *listed.TERMS,
    *listed.SOLUTIONS,
    *SENTENCES,
]
KINDS_OF_OWN: set[tuple[bool, str]] = {*KINDS, *((same, name) for same, name, _ in AROUND)}
"""The label and name of every kind of pairs of these golds."""


def own_pairs(golds: list[Own] | None = None) -> Iterator[Pair]:
    """Every pair of every kind."""
    for own in OWN if golds is None else golds:
        form = type(own).__name__.lower()
        for (same, name), (of, make) in KINDS.items():
            if type(own) is of:
                for answer, meaning in make(own):
                    meant = (own.meaning, meaning, own.points) if meaning and own.meaning else None
                    yield Pair(Gold(own.text, form), answer, same, name, meant=meant, whole=of in (Sentence, Said))
        if not isinstance(own, Sentence | Said):
            for same, name, template in AROUND:
                yield Pair(Gold(own.text, form), template.replace("#", own.text), same, name, whole=True)
