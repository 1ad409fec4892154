"""What a method's class says of it in one place, from which the tables of ``docs/methods.md`` are made."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, get_args

Certainty = Literal["paper", "code read", "note", "abstract only", "ours"]
"""Where the formula is from: ``paper``: as printed there; ``code read``: of the authors or of a peer; ``note``: a third
party's; ``abstract only``: the constants, and at times the form, are ours; ``ours``: defined here."""


@dataclass(frozen=True)
class Method:
    """A row of the table, an attribute ``method`` of the class that is the method.

    Args:
        formula: in the notation of :mod:`ibro_lightning.update.loss`.
        source: the paper, such as ``arXiv 2507.18391``, or "–".
        certainty: of the formula.
        recipe: what chooses it in a recipe's ``model.init_args``, with its defaults, and the further settings of its
            paper.
    """

    formula: str
    source: str
    certainty: Certainty
    recipe: str

    def __post_init__(self) -> None:
        if self.certainty not in get_args(Certainty):
            raise ValueError(f"certainty is one of {', '.join(get_args(Certainty))}, got {self.certainty}")


def table(rows: Iterable[tuple[str, Method]]) -> str:
    """Named methods as a table in Markdown."""
    lines = ["| method | formula | source | certainty | recipe line |", "| --- | --- | --- | --- | --- |"]
    for name, method in rows:
        formula = method.formula.replace("|", "\\|")
        lines.append(f"| `{name}` | {formula} | {method.source} | {method.certainty} | `{method.recipe}` |")
    return "\n".join(lines)
