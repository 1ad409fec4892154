"""What an answer says besides its value: both signs of a ±, and the names that values are given."""

from __future__ import annotations

import re
from collections.abc import Sequence

from ibro_lightning.rewards.mathematics.answers.node import STRUCTURES, Node, mapped


def without_signs(node: Node) -> Node:
    """``1 ± √5`` as the list of its two values; inside a list or set, among its elements."""
    if node.op in ("list", "set"):
        items = [item for part in node.args for item in _elements(without_signs(part), part)]
        return Node(node.op, tuple(items))
    if node.op == "relation" and node.args[1] == "=" and len(node.args) == 3 and _has_sign(node):
        return Node(
            "list", tuple(Node("relation", (node.args[0], "=", value)) for value in without_signs(node.args[2]).args)
        )
    if not _has_sign(node) or node.op in STRUCTURES - {"matrix"}:
        return node
    both = []
    for upper in (True, False):
        both.append(mapped(node, lambda part, upper=upper: _with_sign(part, upper)))  # type: ignore[misc]
    return Node("list", tuple(both))


def _elements(changed: Node, before: Node) -> Sequence[Node]:
    return changed.args if changed.op == "list" and before.op != "list" else (changed,)


def _has_sign(node: Node) -> bool:
    return node.op in ("plusminus", "minusplus") or any(_has_sign(part) for part in node.nodes())


def _with_sign(node: Node, upper: bool) -> Node:
    if node.op == "plusminus":
        return node.args[0] if upper else Node("neg", node.args)
    if node.op == "minusplus":
        return Node("neg", node.args) if upper else node.args[0]
    return node


def other_names(gold: Node, answer: Node) -> bool:
    """Whether both are values of a symbol each, and these are two."""
    names = [node.args[0] for node in (gold, answer) if node.op == "relation" and node.args[1] in ("=", "in")]
    return len(names) == 2 and all(is_name(name) for name in names) and names[0] != names[1]


def of_equations(node: Node) -> Node:
    """The value of an equation that only names it, as ``x = 5`` and ``AB = 4``; of a list of such, the list of values,
    in order. Anything else unchanged."""
    if node.op == "relation" and set(node.args[1::2]) == {"="} and (len(node.args) > 3 or is_name(node.args[0])):
        return of_equations(node.args[-1]) if node.args[-1].op != "relation" else node
    if node.op == "relation" and node.args[1] == "in" and len(node.args) == 3 and is_name(node.args[0]):
        value: Node = node.args[2]
        return value
    if node.op == "list" and (pairs := named(node)):
        names, values = zip(*pairs, strict=True)
        # The values of one symbol, or of several with numbers (x_1, x_2), are a list; those of different ones a tuple.
        one = len({re.sub(r"_\d+$", "", name) for name in names}) == 1
        return Node("list" if one else "tuple", tuple(values))
    return node


def named(node: Node) -> list[tuple[str, Node]]:
    """The pairs in ``x = 1, y = 2``; of ``n = 2, 3, 4`` the three values of n. Empty for anything else."""
    pairs: list[tuple[str, Node]] = []
    for item in node.args:
        if item.op == "relation" and len(item.args) == 3 and item.args[1] == "=" and is_name(item.args[0]):
            pairs.append((_name_of(item.args[0]), item.args[2]))
        elif pairs and item.op not in ("relation", "list"):
            pairs.append((pairs[-1][0], item))
        else:
            return []
    return pairs


def is_name(node: Node) -> bool:
    """A symbol, ``f(x)``, ``|AB|``, ``AB``, ``P(A)``, ``(x, y)``: what an answer may be named by."""
    if node.op == "symbol":
        return True
    if node.op == "tuple":
        return all(part.op == "symbol" for part in node.args)
    if node.op == "ratio":
        return all(is_name(part) for part in node.args)
    if node.op == "call":
        known = node.args[0] in ("abs", "det", "deg", "dim", "max", "min", "arg", "Re", "Im")
        return (
            all(is_name(part) for part in node.nodes())
            if known
            else len(node.args[0]) == 1 or node.args[0].endswith("^-1")
        )
    if node.op == "mul":
        names = [part.args[0] for part in node.args if part.op == "symbol"]
        return len(names) == len(node.args) and all(name[0].isupper() or not name.isascii() for name in names)
    return False


def _name_of(node: Node) -> str:
    return str(node.args[0]) if node.op == "symbol" else repr(node)


def named_value(node: Node) -> Node:
    """``f(x)`` as one symbol, as in 0 < f(x) < 1."""
    if (
        node.op == "call"
        and is_name(node)
        and all(part.op == "symbol" for part in node.nodes())
        and len(node.args[0]) == 1
    ):
        return Node("symbol", (repr(node),))
    return node


def renamed(node: Node) -> Node:
    """The same with symbols called by the order in which they come."""
    names: dict[str, str] = {}

    def rename(part: Node) -> Node:
        if part.op == "tuple":
            return Node("list", part.args)
        if part.op == "symbol":
            return Node("symbol", (names.setdefault(part.args[0], f"s{len(names)}"),))
        return part

    return mapped(node, rename)
