"""Answers as expressions of the math-verify library: read, compared, and spelled as one string.

The library and sympy are imported on first use, so that other rewards do not wait for them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import lru_cache
from types import ModuleType
from typing import Any

_MAX_BITS = 50_000  # about 15,000 digits
_MAX_PARTS = 2000
_MAX_EXPANDED = 200


def parse(text: str, match_types: tuple[str, ...]) -> tuple[Any, ...]:
    """The answer in a text as an expression, if possible, followed by its normalised text; () without an answer."""
    try:
        return tuple(library().parse(text, list(targets(match_types)), parsing_timeout=None, raise_on_error=True))
    except MemoryError:
        raise
    except Exception:  # hostile text makes the library, its parser and sympy raise almost anything
        return ()


def equal(gold: Any, answer: Any, options: Mapping[str, Any]) -> bool:
    """Whether two items from :func:`parse` are the same, with ``options`` of the library; texts equal only texts."""
    if isinstance(gold, str) or isinstance(answer, str):
        return isinstance(gold, str) and isinstance(answer, str) and gold.strip() == answer.strip() != ""
    try:
        if is_heavy(gold) or is_heavy(answer):
            return bool(gold == answer)
        return bool(library().verify(gold, answer, **options, timeout_seconds=None, raise_on_error=True))
    except MemoryError:
        raise
    except Exception:  # as above
        return False


def spelled(found: tuple[Any, ...]) -> str:
    """One string for a result of :func:`parse`: a number in lowest terms, anything else as sympy prints it."""
    if not found:
        return ""
    first, text = found[0], str(found[-1]) if isinstance(found[-1], str) else ""
    try:
        if isinstance(first, str) or is_heavy(first):
            return text[:200]
        if type(first).__name__ == "Equality" and first.lhs.is_Symbol:
            first = first.rhs  # as the library takes x = 5 for 5
        return _rational(first) or str(first)[:200]
    except MemoryError:
        raise
    except Exception:  # as above
        return text[:200]


def _rational(expression: Any) -> str:
    """``6/8``, ``0.75`` and ``\\frac{3}{4}`` → ``3/4``; "" for anything but a rational number."""
    from sympy import Add, Float, Mul, Number, Pow, Rational, UnevaluatedExpr, preorder_traversal

    if not all(isinstance(part, Number | Add | Mul | Pow | UnevaluatedExpr) for part in preorder_traversal(expression)):
        return ""
    value = expression.doit()
    if isinstance(value, Float):
        value = Rational(str(value))
    return str(value) if value.is_Rational else ""


@lru_cache(maxsize=16)
def targets(match_types: tuple[str, ...]) -> tuple[Any, ...]:
    """What the library looks for; a box takes precedence."""
    found = library()
    configs = {
        "latex": lambda: found.LatexExtractionConfig(boxed_match_priority=0),  # a box takes precedence
        "expr": found.ExprExtractionConfig,
        "string": found.StringExtractionConfig,
    }
    return tuple(configs[kind]() for kind in match_types)


@lru_cache(maxsize=1)
def library() -> ModuleType:
    """math-verify, without its warning that it has no time limit: the pool has one."""
    import math_verify

    math_verify.parser.TIMEOUT_WARNING_SHOWN = math_verify.grader.TIMEOUT_WARNING_SHOWN = True
    return math_verify


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
