"""Where two terms are compared: assignments of their symbols, chosen by what is in the terms."""

from __future__ import annotations

from typing import Any

from ibro_lightning.rewards.mathematics.answers.node import Node, symbols
from ibro_lightning.rewards.mathematics.answers.rationals import Uncertain
from ibro_lightning.rewards.mathematics.answers.values import Evaluation, context, hashed

_PLAIN = 25
_OF_CONSTANTS = 8
_GRID = 80
_BROKEN = frozenset(["abs", "max", "min", "floor", "ceil", "sgn", "root", "arg"])
_WHOLE = frozenset(["gcd", "lcm", "mod", "floor", "ceil", "factorial", "binom"])
# Numbers with many divisors, and with few.
_WHOLE_NUMBERS = (12, 18, 24, 30, 36, 45, 48, 60, 7, 8, 9, 10, 11, 13, 14, 15, 20, 21, 22, 25, 28, 33, 35, 77, 96, 120)


def points(*terms: Node) -> list[dict[str, Any]]:
    """Twenty-five assignments of positive numbers, numbers of both signs, consecutive whole numbers, numbers between −1
    and 1, and large ones; beside each constant of the terms; and more where a function has breaks or is of whole
    numbers."""
    names = sorted(frozenset().union(*map(symbols, terms)))
    calls = frozenset().union(*map(_calls, terms))
    assignments = _plain(names)
    if names:
        assignments += _beside(names, _constants(terms))
    if calls & _BROKEN:
        assignments += [{name: _share(name, place) * 140 - 70 for name in names} for place in range(30, 30 + _GRID)]
    if calls & _WHOLE:
        assignments += [{name: _whole(name, place) for name in names} for place in range(30)]
    return assignments


def _share(name: str, place: int) -> Any:
    """A number from 0 to 1 that belongs to a name and a place."""
    return context().mpf(hashed(f"{name} {place}", 1)[0]) / 2**61


def _whole(name: str, place: int) -> Any:
    return context().mpf(_WHOLE_NUMBERS[hashed(f"{name} whole {place}", 1)[0] % len(_WHOLE_NUMBERS)])


def _plain(names: list[str]) -> list[dict[str, Any]]:
    mp = context()
    assignments: list[dict[str, Any]] = [{} for _ in range(_PLAIN)]
    for name in names:
        first = hashed(name, 1)[0]
        for place, assignment in enumerate(assignments):
            share = _share(name, place)
            if place < 4:
                assignment[name] = share * 3 + mp.mpf(1) / 7
            elif place < 9:
                assignment[name] = (share - mp.mpf(1) / 2) * 7
            elif place < 15:  # of all residues of 2, 3 and 6
                assignment[name] = mp.mpf(1 + first % 5 + (place - 9))
            elif place < 19:
                assignment[name] = (share - mp.mpf(1) / 2) * mp.mpf("1.8")
            elif place < 22:
                assignment[name] = share * mp.mpf("0.55") + mp.mpf("0.02")
            else:
                assignment[name] = (6 + share * 40) * (-1 if place == 24 else 1)
    return assignments


def _beside(names: list[str], constants: list[Any]) -> list[dict[str, Any]]:
    """Below and above each constant, its negative and the quotients of two, where a term may have an edge."""
    edges = constants + [a / b for a in constants[:3] for b in constants[:3] if b != 0 and a != b]
    found = []
    for place, edge in enumerate(edges):
        for sign in (-1, 1):
            for side in (-1, 1):
                distance = {name: _share(name, 200 + place) * (1 + abs(edge)) / 9 for name in names}
                found.append({name: sign * edge + side * distance[name] for name in names})
    return found


def _constants(terms: tuple[Node, ...]) -> list[Any]:
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
    if mp.im(value) == 0 and mp.mpf(10) ** -6 < size < mp.mpf(10) ** 9 and size not in found:
        found.append(mp.re(size))


def _calls(node: Node) -> frozenset[str]:
    own = frozenset([node.args[0]]) if node.op == "call" else frozenset()
    return own.union(*(_calls(part) for part in node.nodes()))
