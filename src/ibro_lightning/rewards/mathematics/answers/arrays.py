"""The entries of matrices and vectors, also of what is computed from matrices."""

from __future__ import annotations

from ibro_lightning.rewards.mathematics.answers.node import Node, integer, is_term

Table = tuple[tuple[Node, ...], ...]
_TRANSPOSED = (Node("symbol", ("T",)), Node("symbol", ("top",)))
_UNIT_VECTORS = ("vec i", "vec j", "vec k")


def vector(node: Node) -> tuple[Node, ...] | None:
    """The entries of a point, a row or a column, and of ``2\\mathbf i + 3\\mathbf j``; None for anything else."""
    if node.op in ("tuple", "closed"):
        return node.args
    if node.op == "matrix":
        if len(node.args) == 1:
            row: tuple[Node, ...] = node.args[0]
            return row
        return tuple(row[0] for row in node.args) if all(len(row) == 1 for row in node.args) else None
    return _of_unit_vectors(node)


def _of_unit_vectors(node: Node) -> tuple[Node, ...] | None:
    entries: dict[str, Node] = {}
    for part in node.args if node.op == "add" else (node,):
        sign, term = (-1, part.args[0]) if part.op == "neg" else (1, part)
        *factors, last = term.args if term.op == "mul" else (term,)
        name = last.args[0] if last.op == "symbol" else ""
        if name not in _UNIT_VECTORS or name in entries:
            return None
        entry = Node("mul", tuple(factors)) if len(factors) > 1 else factors[0] if factors else integer(1)
        entries[name] = entry if sign > 0 else Node("neg", (entry,))
    size = 3 if _UNIT_VECTORS[2] in entries else 2
    return tuple(entries.get(name, integer(0)) for name in _UNIT_VECTORS[:size])


def table(node: Node) -> Table | None:
    """The entries of a matrix, or of a sum, difference, multiple or transpose of matrices; None for anything else."""
    if node.op == "matrix":
        return node.args
    if node.op == "pow" and node.args[1] in _TRANSPOSED:
        rows = table(node.args[0])
        return None if rows is None else tuple(zip(*rows, strict=True))
    if node.op == "add":
        parts = [rows for part in node.args if (rows := table(part)) is not None]
        if len(parts) < len(node.args) or len({(len(rows), len(rows[0])) for rows in parts}) != 1:
            return None
        return tuple(
            tuple(Node("add", entries) for entries in zip(*rows, strict=True)) for rows in zip(*parts, strict=True)
        )
    if node.op == "neg":
        rows = table(node.args[0])
        return None if rows is None else tuple(tuple(Node("neg", (entry,)) for entry in row) for row in rows)
    if node.op == "mul":
        matrices = [part for part in node.args if table(part) is not None]
        factors = tuple(part for part in node.args if table(part) is None)
        if len(matrices) != 1 or not all(is_term(factor) for factor in factors):
            return None
        rows = table(matrices[0])
        return None if rows is None else tuple(tuple(Node("mul", (*factors, entry)) for entry in row) for row in rows)
    return None
