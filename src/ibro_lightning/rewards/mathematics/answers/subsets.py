"""Sets of real numbers, however they are written: intervals, unions, inequalities, conditions on one symbol.

Two descriptions are the same set if they agree on each number in either of them and its negative, on the roots that are
found in their inequalities, on both sides of these, and between and beyond them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

from ibro_lightning.rewards.mathematics.answers.node import Node, is_term, symbols
from ibro_lightning.rewards.mathematics.answers.rationals import TooLarge, Uncertain
from ibro_lightning.rewards.mathematics.answers.roots import roots
from ibro_lightning.rewards.mathematics.answers.values import Evaluation, agree, context, real_value

Predicate = Callable[[Any], bool]
_INEQUALITIES = {"<", ">", "<=", ">=", "!="}
_MAX_CRITICAL = 60
_MAX_CONDITIONS = 10


def is_subset(node: Node) -> bool:
    """Whether a node describes a set of real numbers, and no single value, point or equation."""
    if node.op in ("interval", "union", "intersection", "difference", "any", "all"):
        return True
    if node.op == "relation":
        if node.args[1] == "in":
            return is_subset(node.args[2]) or node.args[2].op in ("tuple", "closed", "set") or _is_field(node.args[2])
        return all(operator in _INEQUALITIES for operator in node.args[1::2]) and len(symbols(node)) == 1
    return _is_field(node) or node == Node("symbol", ("R+",))


def same_subset(first: Node, second: Node) -> bool:
    """Whether both describe the same numbers. Raises :class:`Uncertain` for what describes none."""
    critical = list(_distinct([context().mpf(0), *_numbers(first), *_numbers(second)]))
    if len(critical) > _MAX_CRITICAL or max(_conditions(first), _conditions(second)) > _MAX_CONDITIONS:
        raise Uncertain("too many numbers")
    for root in (*roots(first), *roots(second)):
        if not any(abs(root - number) < context().mpf(10) ** -30 * (1 + abs(number)) for number in critical):
            critical.append(root)
    critical = sorted({*critical, *(-number for number in critical)})
    contains_first, contains_second = predicate(first), predicate(second)
    return all(contains_first(number) == contains_second(number) for number in _tests(critical)) and all(
        _agree_beyond(number, contains_first, contains_second) for number in _beyond(critical)
    )


def _agree_beyond(number: Any, first: Predicate, second: Predicate) -> bool:
    try:
        return first(number) == second(number)
    except TooLarge:  # such as 2^x, whose bound is far below; nearer, what cannot be computed is no agreement
        return True


def _conditions(node: Node) -> int:
    return 1 if node.op == "relation" else sum(map(_conditions, node.nodes()))


def symbols_of_subset(node: Node) -> frozenset[str]:
    if _is_field(node) or node == Node("symbol", ("R+",)):
        return frozenset()
    if node.op == "relation" and node.args[1] == "in":
        return symbols(node.args[0]) | symbols_of_subset(node.args[2])
    if node.op in ("union", "intersection", "difference", "any", "all"):
        return frozenset().union(*(symbols_of_subset(part) for part in node.nodes()))
    return symbols(node)


def conditions(node: Node) -> Node:
    """Inequalities of one symbol that commas separate: all of them, or any where no number satisfies all."""
    items = node.args
    if node.op != "list" or not all(item.op == "relation" and is_subset(item) for item in items):
        return node
    if len(frozenset().union(*map(symbols_of_subset, items))) != 1 or len(items) > _MAX_CONDITIONS:
        return node
    every = Node("all", items)
    critical = sorted({*_distinct([number for item in items for number in (*_numbers(item), *roots(item))])})
    contains = predicate(every)
    return every if any(contains(number) for number in (*_tests(critical), *_beyond(critical))) else Node("any", items)


def _is_field(node: Node) -> bool:
    return (node.op == "symbol" and node.args[0] == "mathbb R") or (node.op == "text" and node.args[0].lower() in _ALL)


_ALL = frozenset({"all real numbers", "all reals", "real numbers", "all real"})


def _tests(critical: list[Any]) -> Iterator[Any]:
    mp = context()
    tiny = mp.mpf(10) ** -9
    for number in critical:
        yield number
        step = tiny * (1 + abs(number))
        yield number - step
        yield number + step
    for left, right in pairwise(critical):
        yield (left + right) / 2


def _beyond(critical: list[Any]) -> Iterator[Any]:
    mp = context()
    edge = abs(critical[-1]) if critical else mp.mpf(1)
    for factor in (mp.mpf("1.37"), mp.mpf("9.1"), mp.mpf(10) ** 6 + mp.mpf("0.3")):
        yield factor * (edge + 1)
        yield -factor * (edge + 1)


def _numbers(node: Node) -> Iterator[Any]:
    if is_term(node) and not symbols(node):
        try:
            value = Evaluation()(node)
        except TooLarge:
            raise
        except Uncertain:
            return
        if context().im(value) == 0:
            yield context().re(value)
        return
    for part in node.nodes():
        yield from _numbers(part)


def _distinct(numbers: list[Any]) -> Iterator[Any]:
    found: list[Any] = []
    for number in numbers:
        if not any(agree(number, other, 0) for other in found):
            found.append(number)
            yield number


def predicate(node: Node) -> Predicate:
    """Membership in the set that ``node`` describes."""
    op, args = node.op, node.args
    if _is_field(node):
        return lambda number: True
    if op == "union" or op == "any":
        parts = [predicate(part) for part in args]
        return lambda number: any(part(number) for part in parts)
    if op == "intersection" or op == "all":
        parts = [predicate(part) for part in args]
        return lambda number: all(part(number) for part in parts)
    if op == "difference":
        inside, outside = predicate(args[0]), predicate(args[1])
        return lambda number: inside(number) and not outside(number)
    if op in ("set", "list"):
        values = [real_value(part) for part in args]
        return lambda number: any(agree(number, value, 0) for value in values)
    if op in ("interval", "tuple", "closed"):
        return _between(node)
    if op == "symbol" and args[0] == "R+":
        return lambda number: bool(number > 0)
    if is_term(node) and not symbols(node):
        value = real_value(node)
        return lambda number: agree(number, value, 0)
    if op == "relation":
        if args[1] == "in":
            if args[0].op == "symbol":
                return predicate(args[2])
            raise Uncertain("membership of a term")
        return _condition(node)
    raise Uncertain(op)


def _between(node: Node) -> Predicate:
    if node.op == "interval":
        opening, start, end, closing = node.args
    else:
        if len(node.args) != 2:
            raise Uncertain("more than two ends")
        start, end = node.args
        opening, closing = ("(", ")") if node.op == "tuple" else ("[", "]")
    low, high = real_value(start), real_value(end)
    if low >= high:
        raise Uncertain("ends that do not ascend")

    def contains(number: Any) -> bool:
        at_low, at_high = (bool(context().isfinite(end)) and agree(number, end, 0) for end in (low, high))
        if at_low or at_high:
            return (not at_low or opening == "[") and (not at_high or closing == "]")
        return bool(low < number < high)

    return contains


def _condition(node: Node) -> Predicate:
    name = next(iter(symbols(node)), "")
    if any(operator not in _INEQUALITIES | {"="} for operator in node.args[1::2]):
        raise Uncertain("a relation of another kind")
    if not all(is_term(part) for part in node.args[::2]):
        raise Uncertain("a relation of what is no number")

    def contains(number: Any) -> bool:
        evaluation = Evaluation({name: number})
        try:
            values = [real_value(part, evaluation) for part in node.args[::2]]
        except TooLarge:
            raise
        except Uncertain:  # where a side has no value, the condition does not hold
            return False
        return all(
            _holds(left, operator, right, evaluation.scale)
            for left, operator, right in zip(values, node.args[1::2], values[1:], strict=False)
        )

    return contains


def _holds(left: Any, operator: str, right: Any, scale: Any) -> bool:
    mp = context()
    equal = left == right if mp.isinf(left) or mp.isinf(right) else agree(left, right, scale)
    if operator == "=":
        return bool(equal)
    if operator == "!=":
        return not equal
    if equal:
        return operator in ("<=", ">=")
    return bool(left < right) if operator in ("<", "<=") else bool(left > right)
