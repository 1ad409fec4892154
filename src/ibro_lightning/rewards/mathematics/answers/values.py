"""The value of a term to 85 digits, whatever it is made of.

Nothing here expands or simplifies: work is bounded by the length of the term, whatever numbers are in it.
"""

from __future__ import annotations

import hashlib
import math
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from ibro_lightning.rewards.mathematics.answers.node import Node
from ibro_lightning.rewards.mathematics.answers.rationals import MAX_BITS, TooLarge, Uncertain, exact

DIGITS = 110
_STEPS = (DIGITS, 4 * DIGITS, 1600)
_LOST = 15
"""Digits that rounding may cost in a computation without cancellation."""
_CERTAIN = 80
_SPARE = 25
"""Of the digits that are computed, so many may be lost to rounding."""
_MAX_EXPONENT = 10**7
SLOW = frozenset(["factorial", "factorial2", "binom", "Gamma"])
"""Functions whose values between whole numbers take milliseconds."""
_PERIODIC = frozenset(["sin", "cos", "tan", "cot", "sec", "csc", "cis"])


_LOCAL = threading.local()


def context() -> Any:
    """This thread's arithmetic of mpmath: its global one has one precision for all threads."""
    if not hasattr(_LOCAL, "context"):
        from mpmath.ctx_mp import MPContext

        _LOCAL.context = MPContext()
        _LOCAL.context.dps = DIGITS
    return _LOCAL.context


class Evaluation:
    """Evaluates terms at one assignment of their symbols.

    ``scale``: the largest number that was added or subtracted so far, against which a difference is 0.
    """

    def __init__(self, assignment: Mapping[str, Any] | None = None, *, real: bool = True, log: str = "e") -> None:
        self.assignment = assignment or {}
        self.real = real
        self.log = log
        self.scale: Any = 0
        self.mp = context()

    def __call__(self, node: Node) -> Any:
        try:
            value = self._value(node)
        except (ZeroDivisionError, ValueError, OverflowError, TypeError, RecursionError) as error:
            raise Uncertain(str(error)) from error
        if not self.mp.isfinite(value):
            raise Uncertain("not finite")
        return value

    def _value(self, node: Node) -> Any:
        mp, op, args = self.mp, node.op, node.args
        if op == "number":
            value = args[0].value
            if max(value.numerator.bit_length(), value.denominator.bit_length()) > MAX_BITS:
                raise TooLarge("too large")
            return mp.mpf(value.numerator) / value.denominator
        if op == "symbol":
            if args[0] not in self.assignment:
                raise Uncertain(f"no value for {args[0]}")
            return self.assignment[args[0]]
        if op == "constant":
            return {"pi": lambda: +mp.pi, "e": lambda: +mp.e, "i": lambda: mp.mpc(0, 1)}.get(args[0], _no_value)()
        if op == "neg":
            return -self._value(args[0])
        if op == "percent":
            return self._value(args[0]) / 100
        if op == "degree":
            return self._value(args[0]) * mp.pi / 180
        if op == "add":
            values = [self._value(part) for part in args]
            self.scale = max([self.scale, *map(abs, values)])
            return mp.fsum(values)
        if op == "mul":
            return mp.fprod([self._value(part) for part in args])
        if op == "div":
            top, bottom = self._value(args[0]), self._value(args[1])
            if abs(bottom) <= self.scale * mp.mpf(10) ** (_SPARE - mp.dps) and exact(args[1]) is None:
                raise Uncertain("1/0")  # what is left is rounding
            return top / bottom
        if op == "pow":
            return self._power(node)
        if op == "call":
            return self._call(args[0], args[1:])
        raise Uncertain(op)

    def _power(self, node: Node) -> Any:
        base, exponent = self._value(node.args[0]), self._value(node.args[1])
        if base == 0:
            if self.mp.re(exponent) < 0:
                raise Uncertain("1/0")
            return self.mp.mpf(int(exponent == 0))
        if abs(exponent) * abs(self.mp.log(abs(base))) > _MAX_EXPONENT:
            raise TooLarge("too large")
        if self.real and self.mp.im(base) == 0 and self.mp.re(base) < 0:
            power = exact(node.args[1])
            if power is not None and power.denominator % 2 == 1:  # an odd root of a negative number is real
                size = self.mp.power(-base, exponent)
                return size if power.numerator % 2 == 0 else -size
        return self.mp.power(base, exponent)

    def _call(self, name: str, nodes: tuple[Node, ...]) -> Any:
        mp = self.mp
        if name == "det":
            return self._determinant(nodes[0])
        args = [self._value(node) for node in nodes]
        if name == "root":
            degree, radicand = args
            if degree == 0 or abs(degree) > 10**6:
                raise Uncertain("a root")
            if mp.im(radicand) == 0 and radicand < 0 and degree == int(degree) and int(degree) % 2 == 1:
                return -mp.power(-radicand, 1 / degree)
            return mp.sqrt(radicand) if degree == 2 else mp.power(radicand, 1 / degree)
        if name == "log":
            return mp.log(args[0]) if self.log == "e" else mp.log(args[0]) / mp.log(10)
        if name in SLOW and any(abs(arg) > 10**5 for arg in args):
            raise TooLarge("too large")
        if name in _PERIODIC and any(abs(arg) > 10**9 for arg in args):
            raise TooLarge("too large")
        if name in ("gcd", "lcm", "floor", "ceil", "mod") and any(abs(arg) > mp.mpf(10) ** 40 for arg in args):
            raise TooLarge("too large")
        gamma = name in SLOW and any(arg != mp.floor(mp.re(arg)) for arg in args)
        if gamma and mp.dps > 4 * DIGITS:
            raise TooLarge("so many digits take too long")
        if name == "cis":
            return mp.expj(args[0])
        if name == "radians":
            return args[0]
        if name in ("exp", "sinh", "cosh") and abs(args[0]) > _MAX_EXPONENT:
            raise TooLarge("too large")
        if name in ("floor", "ceil", "max", "min", "gcd", "lcm", "sgn", "mod") and any(mp.im(arg) != 0 for arg in args):
            raise Uncertain("of complex numbers")
        if name in ("gcd", "lcm"):
            if any(arg != int(arg) for arg in args):
                raise Uncertain("of whole numbers alone")
            return mp.mpf((math.gcd if name == "gcd" else math.lcm)(*(int(arg) for arg in args)))
        if name in ("max", "min"):
            return max(args) if name == "max" else min(args)
        if known := _functions(mp).get(name):
            return known(*args)
        return self._unknown(name, args)

    def _unknown(self, name: str, args: list[Any]) -> Any:
        """Of a function that is only named: a smooth one that belongs to its name."""
        first, *others = (self.mp.mpf(part) / 2**61 for part in hashed(name, 2 + len(args)))
        value = 1 + first
        for arg, factor in zip(args, others[1:], strict=True):
            value += self.mp.sin(others[0] + (1 + factor) * arg) * (2 + factor) + arg * arg * factor
        return value

    def _determinant(self, node: Node) -> Any:
        if node.op != "matrix":
            return self._unknown("det", [self._value(node)])
        rows = [[self._value(entry) for entry in row] for row in node.args]
        if len(rows) != len(rows[0]) or len(rows) > 8:
            raise Uncertain("a determinant")
        return self.mp.det(self.mp.matrix(rows))


def _no_value() -> Any:
    raise Uncertain("infinite")


def _functions(mp: Any) -> dict[str, Callable[..., Any]]:
    if not hasattr(_LOCAL, "functions"):
        _LOCAL.functions = {
            **{
                name: getattr(mp, name)
                for name in [
                    "sin",
                    "cos",
                    "tan",
                    "cot",
                    "sec",
                    "csc",
                    "sinh",
                    "cosh",
                    "tanh",
                    "coth",
                    "exp",
                    "floor",
                    "ceil",
                ]
            },
            "arcsec": mp.asec,
            "arccsc": mp.acsc,
            "arcsinh": mp.asinh,
            "arccosh": mp.acosh,
            "arctanh": mp.atanh,
            "arccoth": mp.acoth,
            "mod": lambda x, y: x - y * mp.floor(x / y),
            "arcsin": mp.asin,
            "arccos": mp.acos,
            "arctan": mp.atan,
            "arccot": mp.acot,
            "ln": mp.log,
            "abs": abs,
            "factorial": mp.factorial,
            "factorial2": mp.fac2,
            "binom": mp.binomial,
            "Gamma": mp.gamma,
            "sgn": mp.sign,
            "log10": lambda x: mp.log(x) / mp.log(10),
            "log_b": lambda x, base: mp.log(x) / mp.log(base),
            "Re": mp.re,
            "Im": mp.im,
            "arg": mp.arg,
        }
    functions: dict[str, Callable[..., Any]] = _LOCAL.functions
    return functions


def real_value(node: Node, evaluation: Evaluation | None = None) -> Any:
    """The value of a term that has a real one, or infinity. Raises :class:`Uncertain` for any other."""
    mp = context()
    if node.op == "constant" and node.args[0] == "inf":
        return mp.inf
    if node.op == "neg" and node.args[0].op == "constant" and node.args[0].args[0] == "inf":
        return -mp.inf
    value = (evaluation or Evaluation())(node)
    if mp.im(value) != 0:
        raise Uncertain("complex numbers have no order")
    return mp.re(value)


def hashed(name: str, count: int) -> list[int]:
    """Whole numbers below 2^61 that belong to a name."""
    digest = hashlib.sha512(name.encode()).digest()
    while len(digest) < 8 * count:
        digest += hashlib.sha512(digest).digest()
    return [int.from_bytes(digest[8 * place : 8 * place + 8], "big") >> 3 for place in range(count)]


def same_value(first: Node, second: Node, assignment: Mapping[str, Any], *, real: bool, log: str = "e") -> bool | None:
    """Whether two terms have the same value at an assignment; None where one has none, or not a real one if ``real``.

    Computed with more and more digits, until what is left after everything that cancels is certain to 80 digits; two
    values that are nothing even among 1,600 digits are both 0.
    """
    mp = context()
    for count in _STEPS:
        with digits(count):
            evaluations = [Evaluation(assignment, real=real, log=log) for _ in range(2)]
            try:
                values = [evaluation(node) for evaluation, node in zip(evaluations, (first, second), strict=True)]
            except Uncertain:
                return None
            if real and assignment and any(mp.im(value) != 0 for value in values):
                return None
            largest = max(map(abs, values))
            error = (largest + evaluations[0].scale + evaluations[1].scale) * mp.mpf(10) ** (_LOST - count)
            if abs(values[0] - values[1]) > error:
                return False
            if error <= largest * mp.mpf(10) ** -_CERTAIN:
                return True
    return True if error < mp.mpf(10) ** -(_STEPS[-1] // 2) else None


def agree(first: Any, second: Any, scale: Any) -> bool:
    """Whether two computed values are the same: to 25 digits fewer than are computed; or both no more than
    rounding errors of ``scale``."""
    mp = context()
    largest, tolerance = max(abs(first), abs(second)), mp.mpf(10) ** (_SPARE - mp.dps)
    if largest <= scale * tolerance:
        return True
    return bool(abs(first - second) <= largest * tolerance)


@contextmanager
def digits(count: int) -> Iterator[None]:
    """Compute with so many digits."""
    mp = context()
    before, mp.dps = mp.dps, count
    try:
        yield
    finally:
        mp.dps = before


def is_rational(node: Node) -> bool:
    """Whether a term is made of numbers, the four operations, whole powers and factorials alone: if :func:`exact` does
    not know its value, it is too large."""
    if node.op in ("number", "add", "mul", "div", "neg", "percent"):
        return all(is_rational(part) for part in node.nodes())
    if node.op == "pow":
        return all(is_rational(part) for part in node.nodes()) and not _is_root(node.args[1])
    return (
        node.op == "call" and node.args[0] in ("factorial", "binom") and all(is_rational(part) for part in node.nodes())
    )


def _is_root(exponent: Node) -> bool:
    value = exact(exponent)
    return value is not None and value.denominator != 1
