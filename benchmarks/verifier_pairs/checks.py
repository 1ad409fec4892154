"""Whether the labels of pairs are right, by sympy: closed numbers to 60 digits, everything else at its points."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import sympy

from verifier_pairs.own_kinds import Point
from verifier_pairs.pairs import Pair

NAMES = (
    *("sqrt", "gcd", "lcm", "Min", "Max", "Abs", "floor", "ceiling", "factorial"),
    *("sin", "cos", "asin", "exp", "log", "pi"),
)
Value = Any
"""A number of sympy, whether something holds, a word, or a tuple of these."""


def slope(function: Callable[[Value], Value], at: Value) -> Value:
    """The derivative of a function of one variable, for antiderivatives.

    >>> slope(lambda x: x**3, sympy.Integer(2))
    12
    """
    variable = sympy.Dummy()
    return sympy.diff(function(variable), variable).subs(variable, at)


def value(meaning: str, point: Point) -> Value:
    """What an expression of Python is at a point, with ``rational(3, 4)`` and the imaginary ``unit``.

    >>> value("(x < rational(5, 2), x * y)", {"x": 2, "y": 3})
    (True, 6)
    """
    names = {name: getattr(sympy, name) for name in NAMES}
    at = {name: sympy.Rational(number.numerator, number.denominator) for name, number in point.items()}
    return eval(
        meaning,
        {
            "__builtins__": {"int": int, "bool": bool},
            "rational": sympy.Rational,
            "unit": sympy.I,
            "slope": slope,
            **names,
            **at,
        },
    )


def agree(first: Value, second: Value) -> bool:
    """Numbers to 50 digits, everything else exactly. Raises for a floating-point number, which says too little.

    >>> agree(sympy.sqrt(8), 2 * sympy.sqrt(2)), agree((1, "length"), (1, "time")), agree(True, True)
    (True, False, True)
    """
    if isinstance(first, tuple) and isinstance(second, tuple):
        return len(first) == len(second) and all(map(agree, first, second))
    truths = (bool, sympy.logic.boolalg.BooleanAtom)
    if isinstance(first, truths) and isinstance(second, truths):
        return bool(first) == bool(second)
    numbers = (int, sympy.Expr)
    if isinstance(first, truths) or isinstance(second, truths):
        return False
    if isinstance(first, numbers) and isinstance(second, numbers):
        if isinstance(first, sympy.Float) or isinstance(second, sympy.Float):
            raise TypeError(f"{first} or {second} is no exact number")
        if isinstance(first, int | sympy.Rational) and isinstance(second, int | sympy.Rational):
            return bool(first == second)
        difference = abs(sympy.N(first - second, 60, chop=False))
        return bool(difference < sympy.Float(10) ** -50 * (1 + abs(second)))
    if isinstance(first, float) or isinstance(second, float):
        raise TypeError(f"{first} or {second} is no exact number")
    return bool(first == second)


def closed_number(pair: Pair) -> bool:
    """Whether the two closed numbers of a pair are the same."""
    assert pair.gold.value is not None
    gold = sympy.Rational(pair.gold.value.numerator, pair.gold.value.denominator)
    return agree(sympy.sympify(pair.closed, evaluate=True), gold)


def witness(pair: Pair) -> Point | None:
    """The first point at which gold and answer differ; None if they agree at all of them."""
    assert pair.meant is not None
    gold, answer, points = pair.meant
    return next((point for point in points if not agree(value(gold, point), value(answer, point))), None)


def check(pair: Pair) -> bool:
    """Whether there was something to compute, more than a spelling. Raises for a label that is wrong."""
    if pair.closed and pair.gold.value is not None:
        same = closed_number(pair)
    elif pair.meant is not None and not (pair.same and pair.meant[0] == pair.meant[1]):
        same = witness(pair) is None
    else:
        return False
    if same != pair.same:
        raise AssertionError(f"{pair}: its label is wrong")
    return True
