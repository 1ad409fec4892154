"""The exact value of a rational term, as a fraction; :mod:`.values` has that of any other to 85 digits."""

from __future__ import annotations

import math
from collections.abc import Mapping
from fractions import Fraction
from functools import reduce

from ibro_lightning.rewards.mathematics.answers.node import Node, integer, mapped, symbols

MAX_BITS = 50_000  # about 15,000 digits


class Uncertain(ArithmeticError):
    """A value cannot be computed: too large, undefined, or of what has no value."""


class TooLarge(Uncertain):
    """A value that exists, but takes too long."""


def exact(node: Node) -> Fraction | None:
    """The value of a rational term; None for any other term, and for numbers of more than 50,000 bits."""
    try:
        return _exact(node)
    except (Uncertain, ZeroDivisionError):
        return None


def _exact(node: Node) -> Fraction:
    op, args = node.op, node.args
    if op == "number":
        value: Fraction = args[0].value
        return value
    if op == "neg":
        return -_exact(args[0])
    if op == "percent":
        return _exact(args[0]) / 100
    if op in ("add", "mul"):
        values = [_exact(part) for part in args]
        return _bounded(reduce(lambda a, b: _bounded(a + b if op == "add" else a * b), values))
    if op == "div":
        return _bounded(_exact(args[0]) / _exact(args[1]))
    if op == "pow":
        return _power(_exact(args[0]), _exact(args[1]))
    if op == "call":
        return _exact_call(args[0], args[1:])
    raise Uncertain(op)


def _bounded(value: Fraction) -> Fraction:
    if value.numerator.bit_length() + value.denominator.bit_length() > MAX_BITS:
        raise TooLarge("too large")
    return value


def _power(base: Fraction, exponent: Fraction) -> Fraction:
    if exponent.denominator != 1:
        return _rational_root(base, exponent)
    if base in (0, 1, -1):
        return Fraction(base ** int(exponent)) if base else _zero_power(exponent)
    bits = max(base.numerator.bit_length(), base.denominator.bit_length())
    if abs(exponent) * bits > MAX_BITS:
        raise TooLarge("too large")
    return base ** int(exponent)


def _zero_power(exponent: Fraction) -> Fraction:
    if exponent < 0:
        raise ZeroDivisionError
    return Fraction(int(exponent == 0))


def _rational_root(base: Fraction, exponent: Fraction) -> Fraction:
    degree = exponent.denominator
    if degree > 64 or base < 0:
        raise Uncertain("a root")
    roots = [_integer_root(part, degree) for part in (base.numerator, base.denominator)]
    return _power(Fraction(roots[0], roots[1]), Fraction(exponent.numerator))


def _integer_root(value: int, degree: int) -> int:
    """The root of a whole number, if it is a whole number."""
    if value.bit_length() > 4000:
        raise TooLarge("too large")
    low, high = 0, 1 << (value.bit_length() // degree + 1)
    while low < high:
        middle = (low + high) // 2
        if middle**degree < value:
            low = middle + 1
        else:
            high = middle
    if low**degree != value:
        raise Uncertain("irrational")
    return low


def _exact_call(name: str, args: tuple[Node, ...]) -> Fraction:
    values = [_exact(part) for part in args]
    if name == "root":
        if values[0] == 0 or values[0].denominator != 1:
            raise Uncertain("a root")
        if values[1] < 0 and values[0] % 2 == 1:
            return -_power(-values[1], 1 / values[0])
        return _power(values[1], 1 / values[0])
    if name == "abs":
        return abs(values[0])
    if name == "floor":
        return Fraction(math.floor(values[0]))
    if name == "ceil":
        return Fraction(math.ceil(values[0]))
    if name in ("max", "min"):
        return max(values) if name == "max" else min(values)
    if name in ("gcd", "lcm", "factorial", "factorial2", "binom", "mod") and all(
        value.denominator == 1 for value in values
    ):
        return Fraction(_whole(name, [int(value) for value in values]))
    raise Uncertain(name)


def _whole(name: str, values: list[int]) -> int:
    if name == "gcd":
        return math.gcd(*values)
    if name == "lcm":
        return math.lcm(*values)
    if name == "mod":
        return values[0] % values[1]
    if name == "binom":
        n, k = values
        if not 0 <= n <= 5000 or k < 0:
            raise Uncertain("binom")
        return math.comb(n, k)
    n = values[0]
    if not 0 <= n <= 3000:
        raise Uncertain("factorial")
    return math.factorial(n) if name == "factorial" else math.prod(range(n, 0, -2))


_MAX_EXPONENT = 200


def is_rational_expression(node: Node) -> bool:
    """Whether a term is a quotient of polynomials in its symbols, with rational coefficients."""
    if node.op in ("number", "symbol"):
        return True
    if node.op == "pow":
        exponent = None if symbols(node.args[1]) else exact(node.args[1])
        whole = exponent is not None and exponent.denominator == 1 and abs(exponent) <= _MAX_EXPONENT
        return whole and is_rational_expression(node.args[0])
    return node.op in ("add", "mul", "div", "neg", "percent") and all(map(is_rational_expression, node.nodes()))


def exact_at(node: Node, assignment: Mapping[str, int]) -> Fraction | None:
    """:func:`exact` where symbols are whole numbers."""
    return exact(mapped(node, lambda part: integer(assignment[part.args[0]]) if part.op == "symbol" else part))
