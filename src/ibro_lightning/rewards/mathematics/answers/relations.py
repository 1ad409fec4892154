"""Relations as they are written: in ascending order, and as intervals."""

from __future__ import annotations

from ibro_lightning.rewards.mathematics.answers.node import Node, symbols


def is_relation(node: Node) -> bool:
    """Whether a node is a relation other than a membership, or several with "or" or "and" between them."""
    return (node.op == "relation" and node.args[1] != "in") or (node.op in ("any", "all"))


def as_interval(node: Node) -> Node:
    """``a ≤ x < b``, ``(a, b)`` and ``[a, b]`` as intervals with their brackets; anything else unchanged."""
    if node.op in ("tuple", "closed") and len(node.args) == 2:
        opening, closing = ("(", ")") if node.op == "tuple" else ("[", "]")
        return Node("interval", (opening, *node.args, closing))
    if node.op == "relation" and len(node.args) == 5:
        low, first, name, second, high = ascending(node).args
        between = {first, second} <= {"<", "<="} and name.op == "symbol"
        if between and name.args[0] not in symbols(low) | symbols(high):
            return Node("interval", ("(" if first == "<" else "[", low, high, ")" if second == "<" else "]"))
    return node


def ascending(node: Node) -> Node:
    """``b > x > a`` as ``a < x < b``."""
    turned = {">": "<", ">=": "<="}
    if len(node.args) == 3 or not set(node.args[1::2]) <= turned.keys():
        return node
    return Node(
        "relation", tuple(turned.get(part, part) if isinstance(part, str) else part for part in reversed(node.args))
    )
