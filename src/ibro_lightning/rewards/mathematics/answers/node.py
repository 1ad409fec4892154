"""How an answer is held once it has been read: a tree of nodes, from lists and intervals down to digits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

STRUCTURES = frozenset(
    [
        "list",
        "set",
        "tuple",
        "closed",
        "interval",
        "union",
        "intersection",
        "difference",
        "relation",
        "matrix",
        "ratio",
        "based",
        "quantity",
        "text",
        "time",
        "cases",
        "any",
        "all",
    ]
)
"""Operators of what is no single expression."""


class Unread(ValueError):
    """A text is not in the language of answers."""


class Ambiguous(Unread):
    """A text has two readings, as two numbers beside each other do, or is too long: no other reader should try."""


@dataclass(frozen=True, slots=True)
class Decimal:
    """A number as it was written: its value, and the digits that it shows.

    ``places``: digits after the point; ``significant``: digits from the first that is not 0. Both None for a number
    that is exact (an integer, or ``0.\\overline{3}``).
    """

    value: Fraction
    places: int | None = None
    significant: int | None = None


@dataclass(frozen=True, slots=True)
class Node:
    """An operator and what it is applied to: other nodes, names, or a :class:`Decimal`.

    ==============  ============================================================================================
    ``op``          ``args``
    ==============  ============================================================================================
    number          a :class:`Decimal`
    symbol          its name, as written: case matters
    constant        ``pi``, ``e``, ``i`` or ``inf``
    add, mul        two or more terms
    div, pow        two terms
    neg             one term
    plusminus, …    one term with both signs; ``minusplus`` with the other one where there is a ± before
    percent, degree one term with its sign
    call            the function's name and its arguments
    list            statements separated by commas, semicolons or "and", "or"
    set             elements in braces
    tuple           entries in round or angle brackets; of two also an open interval
    closed          two entries in square brackets: an interval, or a vector
    interval        left bracket, start, end, right bracket, of one open and one closed end
    union, …        two sets
    relation        a term, an operator, a term, and further pairs in a chain
    any, all        relations with "or" or "and" between them
    matrix, cases   rows of nodes
    ratio           terms separated by colons
    based           digits and base of a numeral
    quantity        a number and its unit, or several such as "2 hours 30 minutes"
    time            hour, of 24, and minute
    text            words
    ==============  ============================================================================================
    """

    op: str
    args: tuple[Any, ...] = ()

    def nodes(self) -> tuple[Node, ...]:
        """The arguments that are nodes, those in rows of a matrix too."""
        found: list[Node] = []
        for arg in self.args:
            if isinstance(arg, Node):
                found.append(arg)
            elif isinstance(arg, tuple):
                found += [item for item in arg if isinstance(item, Node)]
        return tuple(found)


def integer(value: int) -> Node:
    return Node("number", (Decimal(Fraction(value)),))


def is_term(node: Node) -> bool:
    """Whether a node is one expression, with or without symbols, and no structure but the matrix of a determinant."""
    if node.op == "call" and node.args[0] == "det" and node.args[1].op == "matrix":
        return all(is_term(entry) for entry in node.args[1].nodes())
    return node.op not in STRUCTURES and all(is_term(part) for part in node.nodes())


def symbols(node: Node) -> frozenset[str]:
    """Names of all symbols."""
    if node.op == "symbol":
        return frozenset(node.args[:1])
    return frozenset().union(*(symbols(part) for part in node.nodes()))


def calls(node: Node) -> frozenset[str]:
    """Names of all functions."""
    own = frozenset(node.args[:1]) if node.op == "call" else frozenset()
    return own.union(*(calls(part) for part in node.nodes()))


def size(node: Node) -> int:
    """The number of operations, of which signs, fractions of numbers and mixed numbers are none."""
    parts = node.nodes()
    plain = all(part.op == "number" for part in parts)
    mixed = node.op == "add" and len(parts) == 2 and parts[0].op == "number" and parts[1].op == "div"
    counts = (
        bool(parts) and node.op not in ("neg", "percent", "degree", "quantity") and not (node.op == "div" and plain)
    )
    return sum(map(size, parts)) + (counts and not mixed)


def mapped(node: Node, change: Callable[[Node], Node]) -> Node:
    """``node`` with ``change`` applied to each part, leaves first."""
    args: list[Any] = []
    for arg in node.args:
        if isinstance(arg, Node):
            args.append(mapped(arg, change))
        elif isinstance(arg, tuple):
            args.append(tuple(mapped(item, change) if isinstance(item, Node) else item for item in arg))
        else:
            args.append(arg)
    return change(Node(node.op, tuple(args)))
