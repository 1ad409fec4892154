"""Countdown: combine given numbers with + − × ÷ to reach a target. Any number of numbers; exact arithmetic."""

from __future__ import annotations

import ast
import random
import re
from collections import Counter
from collections.abc import Sequence
from fractions import Fraction

_MAX_CHARACTERS = 500
"""Longer expressions are wrong: nobody needs them, and parsing hostile text must stay cheap."""


_ALLOWED = re.compile(r"[\d+\-*/() ]+", re.ASCII)
"""Python would also read hexadecimal, underscores and comments as parts of numbers."""


class Countdown:
    """The rules.

    Args:
        use_all: every given number must be used exactly once (as in the public files); otherwise at most once.
    """

    def __init__(self, use_all: bool = True) -> None:
        self.use_all = use_all

    def verify(self, expression: str, numbers: Sequence[int], target: int) -> bool:
        """Does ``expression`` (e.g. ``(93 - 30) * 2``) equal ``target`` with these numbers? Never evaluates code."""
        text = expression.strip().replace("×", "*").replace("÷", "/").replace("−", "-")
        if len(text) > _MAX_CHARACTERS or not _ALLOWED.fullmatch(text):
            return False
        try:
            tree = ast.parse(text, mode="eval")
            used: Counter[int] = Counter()
            value = _evaluate(tree.body, used)
        except (SyntaxError, ValueError, ZeroDivisionError, RecursionError, MemoryError):
            return False
        given = Counter(numbers)
        allowed = used == given if self.use_all else used <= given
        return allowed and value == target

    @staticmethod
    def generate(seed: int, k: int, max_number: int) -> tuple[list[int], int]:
        """``k`` numbers in 1..max_number and a positive whole target that they can reach, using each once."""
        rng = random.Random(seed)
        while True:
            numbers = [rng.randint(1, max_number) for _ in range(k)]
            values = [Fraction(number) for number in numbers]
            while len(values) > 1:
                rng.shuffle(values)
                a, b = values.pop(), values.pop()
                results = [a + b, a - b, a * b] + ([a / b] if b else [])
                values.append(rng.choice(results))
            target = values[0]
            if target.denominator == 1 and 0 < target <= 10 * max_number and target not in numbers:
                return numbers, int(target)


def _evaluate(node: ast.expr, used: Counter[int]) -> Fraction:
    if isinstance(node, ast.Constant) and type(node.value) is int:
        used[node.value] += 1
        return Fraction(node.value)
    if isinstance(node, ast.BinOp):
        left, right = _evaluate(node.left, used), _evaluate(node.right, used)
        match node.op:
            case ast.Add():
                return left + right
            case ast.Sub():
                return left - right
            case ast.Mult():
                return left * right
            case ast.Div():
                return left / right
    raise ValueError("only numbers, + - * / and parentheses are allowed")
