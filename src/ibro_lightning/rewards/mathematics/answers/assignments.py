"""Where two terms are compared: assignments of their symbols, chosen by what is in the terms."""

from __future__ import annotations

from typing import Any

from ibro_lightning.rewards.mathematics.answers.node import Node, calls, symbols
from ibro_lightning.rewards.mathematics.answers.rationals import Uncertain
from ibro_lightning.rewards.mathematics.answers.values import Evaluation, context, hashed

_OF_CONSTANTS = 8
_GRID = 80
_BROKEN = frozenset(["abs", "max", "min", "floor", "ceil", "sgn", "root", "arg"])
_WHOLE = frozenset(["gcd", "lcm", "mod", "floor", "ceil", "factorial", "factorial2", "binom"])
_PERIODIC = frozenset(["sin", "cos", "tan", "cot", "sec", "csc", "cis"])
# Numbers with many divisors, and with few.
_WHOLE_NUMBERS = (12, 18, 24, 30, 36, 45, 48, 60, 7, 8, 9, 10, 11, 13, 14, 15, 20, 21, 22, 25, 28, 33, 35, 77, 96, 120)
_SMALLEST, _LARGEST = 10.0**-40, 10.0**40
_LARGEST_DIVISOR = 10**12


def points(*terms: Node) -> list[dict[str, Any]]:
    """Assignments of positive numbers, numbers of both signs, whole numbers, 0, numbers between −1 and 1, and large
    ones; beside each constant of the terms; and more where powers or functions are of whole numbers, or have breaks."""
    names = sorted(frozenset().union(*map(symbols, terms)))
    called = frozenset().union(*map(calls, terms))
    assignments = _plain(names)
    if not names:
        return assignments
    constants = _constants(terms)
    assignments += _beside(names, constants)
    if called & (_WHOLE | _PERIODIC) or any(map(_has_symbolic_exponent, terms)):
        assignments += _of_all_parities(names)
    if called & _BROKEN:
        assignments += [{name: _share(name, place) * 140 - 70 for name in names} for place in range(30, 30 + _GRID)]
    if called & {"floor", "ceil"}:
        assignments += _below_whole(names, constants)
    if called & _WHOLE:
        assignments += [{name: _whole(name, place) for name in names} for place in range(30)]
        assignments += _multiples(names, constants)
    return assignments


def _share(name: str, place: int) -> Any:
    """A number from 0 to 1 that belongs to a name and a place."""
    return context().mpf(hashed(f"{name} {place}", 1)[0]) / 2**61


def _whole(name: str, place: int) -> Any:
    return context().mpf(_WHOLE_NUMBERS[hashed(f"{name} whole {place}", 1)[0] % len(_WHOLE_NUMBERS)])


def _plain(names: list[str]) -> list[dict[str, Any]]:
    mp = context()
    zero, half = mp.mpf(0), mp.mpf(1) / 2
    ranges = [  # how many, and what becomes of a number from 0 to 1
        (4, lambda share: share * 3 + mp.mpf(1) / 7),
        (5, lambda share: (share - half) * 7),
        (6, lambda share: mp.floor(share * 6) + 1),
        (4, lambda share: (share - half) * mp.mpf("1.8")),
        (3, lambda share: share * mp.mpf("0.55") + mp.mpf("0.02")),
        (2, lambda share: 6 + share * 40),
        (1, lambda share: -6 - share * 40),
        (1, lambda share: zero),
    ]
    changes = [change for count, change in ranges for _ in range(count)]
    return [{name: change(_share(name, place)) for name in names} for place, change in enumerate(changes)]


def _is_odd(index: int, place: int) -> bool:
    """A bit for each symbol and place: over sixteen places up to four symbols take all combinations, and any two of
    fifteen do."""
    return (place & _MASKS[index % len(_MASKS)]).bit_count() % 2 == 1


_MASKS = sorted(range(1, 16), key=lambda mask: (mask.bit_count(), mask))


def _of_all_parities(names: list[str]) -> list[dict[str, Any]]:
    """Whole numbers from 1 to 6, odd and even in all ways."""
    return [
        {
            name: context().mpf(1 + 2 * (hashed(f"{name} third {place}", 1)[0] % 3) + _is_odd(index, place))
            for index, name in enumerate(names)
        }
        for place in range(16)
    ]


def _multiples(names: list[str], constants: list[Any]) -> list[dict[str, Any]]:
    """Small multiples of each whole constant, which other whole numbers hardly ever share a divisor with, for some of
    the symbols."""
    divisors = [constant for constant in constants if constant == int(constant) and 1 < constant <= _LARGEST_DIVISOR]
    return [
        {
            name: divisor * (1 + place % 4) if _is_odd(index, place) else _whole(name, place)
            for index, name in enumerate(names)
        }
        for divisor in divisors
        for place in range(1, 8)
    ]


def _below_whole(names: list[str], constants: list[Any]) -> list[dict[str, Any]]:
    """Whole numbers less a part of each constant, where a small one lifts a term over the next step."""
    return [
        {name: _whole(name, place) - constant * (1 + _share(name, place)) / 2 for name in names}
        for place, constant in enumerate(constants)
    ]


def _beside(names: list[str], constants: list[Any]) -> list[dict[str, Any]]:
    """Below and above each constant, its negative and the quotients of two, where a term may have an edge."""
    edges = constants + [a / b for a in constants[:3] for b in constants[:3] if b != 0 and a != b]
    found = []
    for place, edge in enumerate(edges):
        for sign in (-1, 1):
            for side in (-1, 1, 2, 3):  # more of them above, where roots and logarithms have values
                distance = {name: _share(name, 200 + place) * (1 + abs(edge)) / 9 for name in names}
                found.append({name: sign * edge + side * distance[name] for name in names})
    return found


def _constants(terms: tuple[Node, ...]) -> list[Any]:
    """The sizes of up to eight real numbers in the terms."""
    found: list[Any] = []
    for term in terms:
        _collect(term, found)
    return found[:_OF_CONSTANTS]


def _collect(node: Node, found: list[Any]) -> None:
    if symbols(node):
        for part in node.nodes():
            _collect(part, found)
        return
    try:
        value = Evaluation()(node)
    except Uncertain:
        return
    mp = context()
    size = abs(value)
    if mp.im(value) == 0 and _SMALLEST < size < _LARGEST and size not in found:
        found.append(mp.re(size))


def _has_symbolic_exponent(node: Node) -> bool:
    if node.op == "pow" and symbols(node.args[1]):
        return True
    return any(map(_has_symbolic_exponent, node.nodes()))
