"""Where people legitimately differ about what counts as the same answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

UNITS = ("agree", "required", "ignored")


@dataclass(frozen=True)
class Rules:
    """What counts as the same answer.

    Args:
        decimals: a decimal with at least so many digits after the point stands for every number that rounds to it, one
            with fewer for itself alone.
        units: one of :data:`UNITS`: a unit may be left out, and must agree where both have one; it may not be left out;
            units are not compared.
        order: whether the entries of a list without brackets must come in the gold's order.
        simplified: the answer must have no more operations than the gold.
        names: names of symbols matter, and a tuple is no set.
        relations_as_sets: an inequality equals the set that it describes, whichever of the two is the gold; otherwise
            only if the gold is the inequality.
    """

    decimals: int = 6
    units: str = "agree"
    order: bool = False
    simplified: bool = False
    names: bool = True
    relations_as_sets: bool = True


class Judgement(NamedTuple):
    """``same``, and in a word how it was decided: exact, numeric, identity, rounded, set, …, or why not."""

    same: bool
    why: str


def yes(why: str) -> Judgement:
    return Judgement(True, why)


def no(why: str) -> Judgement:
    return Judgement(False, why)


def weakest(judged: Sequence[Judgement], why: str) -> Judgement:
    """The first of several judgements that is against, or ``why`` all are for."""
    return next((judgement for judgement in judged if not judgement.same), yes(why))
