"""Decimals as they are written: which digits they show."""

from __future__ import annotations

from fractions import Fraction

from ibro_lightning.rewards.mathematics.answers.node import Decimal, Node
from ibro_lightning.rewards.mathematics.answers.rationals import exact


def shown(node: Node) -> Decimal | None:
    """A decimal as it was written, also with a sign, a per cent sign or a power of ten; None for all other terms."""
    if node.op == "number":
        number: Decimal = node.args[0]
        return number if number.places is not None else None
    if node.op in ("neg", "percent"):
        return _scaled(shown(node.args[0]), Fraction(-1) if node.op == "neg" else Fraction(1, 100))
    if node.op == "mul" and len(node.args) == 2 and node.args[1].op == "pow" and exact(node.args[1].args[0]) == 10:
        factor = exact(node.args[1])
        return None if factor is None else _scaled(shown(node.args[0]), factor)
    return None


def _scaled(decimal: Decimal | None, factor: Fraction) -> Decimal | None:
    if decimal is None:
        return None
    return Decimal(decimal.value * factor, decimal.places, decimal.significant)


def half_unit(decimal: Decimal) -> Fraction:
    """Half of the last digit that a decimal shows."""
    if decimal.value == 0 or decimal.significant is None or decimal.places is None:
        return Fraction(0)
    # The size of the last digit: the value has `significant` digits, whatever power of ten scales it.
    exponent = _magnitude(decimal.value) - decimal.significant + 1
    return Fraction(10) ** exponent / 2


def _magnitude(value: Fraction) -> int:
    """The power of ten of the leading digit."""
    value = abs(value)
    exponent = int((value.numerator.bit_length() - value.denominator.bit_length()) * 0.30103)
    while value >= Fraction(10) ** (exponent + 1):
        exponent += 1
    while value < Fraction(10) ** exponent:
        exponent -= 1
    return exponent
