"""Estimates the arithmetic that a sympy expression takes, without doing it."""

from __future__ import annotations

import math
from typing import Any

_MAX_BITS = 50_000  # about 15,000 digits
_MAX_PARTS = 2000
_MAX_EXPANDED = 200


def is_heavy(expression: Any) -> bool:
    """Whether working with ``expression`` takes integers above ``2^50,000``, as ``9^{9^{9}}`` and ``1000000!`` do, or
    the expansion of a power such as ``(a+b+c)^{99}``, or it has more than 2,000 parts.

    Only floats are evaluated. Sums and integrals are not inspected: they may still take long.
    """
    return _bits(expression, [_MAX_PARTS]) > _MAX_BITS


def _bits(expression: Any, budget: list[int]) -> float:
    """An upper estimate of the bits of the largest exact intermediate number; infinite above ``budget`` parts."""
    budget[0] -= 1
    if budget[0] < 0:
        return math.inf
    if getattr(expression, "is_Rational", False):
        return float(max(abs(expression.p).bit_length(), expression.q.bit_length()))
    if getattr(expression, "is_Float", False):
        _, _, exponent, bits = expression._mpf_
        return float(abs(exponent + bits))
    is_matrix = hasattr(expression, "shape") and hasattr(expression, "flat")
    parts = [_bits(part, budget) for part in (expression.flat() if is_matrix else expression.args)]
    kind = type(expression).__name__
    if kind == "Pow":
        base, exponent = expression.args
        power = max(_value(exponent), 1.0)
        if len(base.args) * power > _MAX_EXPANDED and base.is_Add and base.free_symbols:
            return math.inf
        return max(1.0 if base in (0, 1, -1) else max(parts[0], 1.0) * power, parts[1])
    if kind.startswith("factorial") or kind in {"gamma", "subfactorial", "RisingFactorial", "FallingFactorial"}:
        number = _value(expression.args[0])
        return max(number * math.log2(number + 2), *parts)
    if kind == "Mul":
        return sum(parts)
    return max(parts, default=1.0) + math.log2(len(parts) + 1)


def _value(expression: Any) -> float:
    """The approximate absolute value of a number, infinite if no float can hold it; 1 for anything but numbers."""
    try:
        value = abs(_float(expression))
    except (OverflowError, ZeroDivisionError):
        return math.inf
    return math.inf if math.isnan(value) else value


def _float(expression: Any) -> Any:
    if expression.is_Number or expression.is_NumberSymbol:
        return float(expression)
    kind = type(expression).__name__
    if kind == "Add":
        return sum(_float(part) for part in expression.args)
    if kind == "Mul":
        return math.prod(_float(part) for part in expression.args)
    if kind == "Pow":
        return _float(expression.args[0]) ** _float(expression.args[1])  # complex for the root of a negative number
    if kind == "factorial":
        return math.gamma(abs(_float(expression.args[0])) + 1)
    return _float(expression.args[0]) if kind == "UnevaluatedExpr" else 1.0
