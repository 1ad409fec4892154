"""All pairs of a gold: those of each kind, with the verdict."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from verifier_pairs.golds import Gold, looked_at
from verifier_pairs.near_misses import NEAR_MISSES
from verifier_pairs.own_kinds import Point
from verifier_pairs.writings import WRITINGS


@dataclass(frozen=True)
class Pair:
    """``closed``: of two closed numbers, the answer as an expression of Python with sympy's names; "" for others.
    ``meant``: of our own golds, the meanings of gold and answer and the points at which they are compared. ``whole``:
    the answer is a whole response, with its own box or none."""

    gold: Gold
    answer: str
    same: bool
    kind: str
    closed: str = ""
    meant: tuple[str, str, tuple[Point, ...]] | None = None
    whole: bool = False

    @property
    def response(self) -> str:
        """What a verifier is given."""
        return self.answer if self.whole else rf"\boxed{{{self.answer}}}"


def pairs_of(text: str) -> Iterator[Pair]:
    """Every other writing of a gold, and every near-miss."""
    gold = looked_at(text)
    for same, kinds in ((True, WRITINGS), (False, NEAR_MISSES)):
        for name, (looks, make) in kinds.items():
            if gold.kind in looks and (made := make(gold)) is not None:
                answer, closed = made if isinstance(made, tuple) else (made, "")
                if answer != gold.text or same:
                    yield Pair(gold, answer, same, name, closed)
