"""Where the two sides of an inequality meet, or one of them ends: the numbers at which its truth can change."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

from ibro_lightning.rewards.mathematics.answers.node import Node, calls, integer, symbols
from ibro_lightning.rewards.mathematics.answers.rationals import TooLarge, Uncertain
from ibro_lightning.rewards.mathematics.answers.values import SLOW, Evaluation, context, real_value

_MAX_ROOTS = 60
_MAX_SEARCHES = 12
Value = Callable[[Any], Any]
"""The difference of two sides at a number; None where it has none."""


def roots(node: Node) -> list[Any]:
    """The roots of all inequalities in a set of numbers that are no bare ``x < 5``, by changes of sign on a grid from
    −10^40 to 10^40. Raises :class:`Uncertain` for more than sixty."""
    found: list[Any] = []
    for name, left, right in _sides(node):
        for root in _meeting(Node("add", (left, Node("neg", (right,)))), name):
            found.append(root)
            if len(found) > _MAX_ROOTS:
                raise Uncertain("too many roots")
    return found


def _sides(node: Node) -> Iterator[tuple[str, Node, Node]]:
    if node.op in ("any", "all", "union", "intersection", "difference"):
        for part in node.nodes():
            yield from _sides(part)
    elif node.op == "relation" and node.args[1] != "in" and len(symbols(node)) == 1:
        for left, right in pairwise(node.args[::2]):
            name = next(iter(symbols(node)))
            bare = "symbol" in (left.op, right.op) and not (symbols(left) and symbols(right))
            inner = [*_inner(left), *_inner(right)]
            if len(inner) > _MAX_SEARCHES:
                raise Uncertain("too many factors")
            for part in dict.fromkeys(inner):  # first: where sides only touch, their own root is less exact
                yield name, part, integer(0)
            if not bare:
                yield name, left, right


def _inner(node: Node) -> Iterator[Node]:
    """Factors, denominators, bases of powers and what is in ``|…|``: where they are 0, a side may touch the other, or
    have a pole, without a change of sign."""
    if not symbols(node) or node.op == "symbol":
        return
    parts: tuple[Node, ...] = ()
    if node.op in ("mul", "div"):
        parts = node.nodes()
    elif node.op == "pow":
        parts = node.args[:1]
    elif node.op == "call" and node.args[0] in ("abs", "sgn"):
        parts = node.nodes()
    yield from (part for part in parts if symbols(part) and part.op != "symbol" and not _is_product(part))
    for part in node.nodes():
        yield from _inner(part)


def _is_product(node: Node) -> bool:
    return node.op in ("mul", "div", "pow") or (node.op == "call" and node.args[0] in ("abs", "sgn"))


def _meeting(difference: Node, name: str) -> Iterator[Any]:
    if calls(difference) & SLOW:
        raise TooLarge("so many values take too long")

    def value(number: Any) -> Any:
        try:
            return real_value(difference, Evaluation({name: number}))
        except Uncertain:
            return None

    grid, values = [], []
    for number in _grid():
        try:
            values.append(real_value(difference, Evaluation({name: number})))
        except TooLarge:  # nothing is known there
            continue
        except Uncertain:
            values.append(None)
        grid.append(number)
    for low, high in pairwise(range(len(grid))):
        if (values[low] is None) != (values[high] is None):
            yield _end(value, grid[low], grid[high])
        elif values[low] is not None and (values[low] < 0) != (values[high] < 0):
            yield _crossing(value, grid[low], grid[high])
    searches = 0
    for place in range(1, len(grid) - 1):
        around = values[place - 1 : place + 2]
        if None in around or len({number < 0 for number in around}) > 1:
            continue
        if not abs(around[1]) < min(abs(around[0]), abs(around[2])):
            continue
        searches += 1
        if searches > _MAX_SEARCHES:
            raise Uncertain("too many extrema")
        lowest = _nearest_zero(value, grid[place - 1], grid[place + 1])
        at_lowest = value(lowest)
        if at_lowest is None:
            continue
        if abs(at_lowest) < context().mpf(10) ** -30:  # the sides touch
            yield lowest
        elif (at_lowest < 0) != (around[0] < 0):  # two roots between two points of the grid
            yield _crossing(value, grid[place - 1], lowest)
            yield _crossing(value, lowest, grid[place + 1])


def _grid() -> list[Any]:
    """Dense up to 400, where periodic functions are asked for; two points per power of ten beyond, and near 0."""
    mp = context()
    sizes = [mp.mpf(step) ** 3 / 40 + mp.mpf("0.0137") for step in range(26)]
    sizes += [mp.mpf(10) ** (mp.mpf(power) / 2 + mp.mpf("0.03")) for power in (*range(-40, -4), *range(6, 81))]
    return sorted([*sizes, *(-size * mp.mpf("1.07") for size in sizes)])


def _crossing(value: Value, low: Any, high: Any) -> Any:
    """The number between two at which the sign changes: by false position with the Illinois rule, and by halves, which
    poles need."""
    at_low, at_high = value(low), value(high)
    negative, moved = at_low < 0, 0
    for step in range(400):
        straight = step < 60 and step % 3 != 2
        middle = (low * at_high - high * at_low) / (at_high - at_low) if straight else (low + high) / 2
        at_middle = value(middle)
        if at_middle is None or at_middle == 0 or abs(high - low) <= abs(middle) * context().mpf(10) ** -100:
            return middle
        if (at_middle < 0) == negative:
            low, at_low, at_high, moved = middle, at_middle, at_high / 2 if moved == -1 else at_high, -1
        else:
            high, at_high, at_low, moved = middle, at_middle, at_low / 2 if moved == 1 else at_low, 1
    return (low + high) / 2


def _end(value: Value, low: Any, high: Any) -> Any:
    """The number between two at which the side ends, as that of a root or a logarithm does."""
    has_low = value(low) is not None
    for _ in range(340):
        middle = (low + high) / 2
        low, high = (middle, high) if (value(middle) is not None) == has_low else (low, middle)
    return (low + high) / 2


def _nearest_zero(value: Value, low: Any, high: Any) -> Any:
    """Where, between two numbers of one sign, the value is nearest to 0, or beyond it."""
    sign = -1 if value(low) < 0 else 1
    for _ in range(260):
        first, second = low + (high - low) / 3, high - (high - low) / 3
        at_first, at_second = value(first), value(second)
        if at_first is None or at_second is None:
            break
        low, high = (low, second) if sign * at_first < sign * at_second else (first, high)
    return (low + high) / 2
