"""Times of day, which may be written as ratios."""

from __future__ import annotations

from ibro_lightning.rewards.mathematics.answers.node import Node
from ibro_lightning.rewards.mathematics.answers.rationals import exact
from ibro_lightning.rewards.mathematics.answers.rules import Judgement, no, yes


def same_times(gold: Node, answer: Node) -> Judgement:
    """Whether a time and an answer that is not equal to it are the same: in the afternoon, 15:30 is, without PM."""
    time, other = (gold, answer) if gold.op == "time" else (answer, gold)
    shown = [exact(part) for part in other.args] if other.op == "ratio" else []
    return yes("time") if shown == list(time.args) and time.args[0] > 12 else no("another time")


def may_be_time(node: Node) -> bool:
    """``3:30``, which 6:60 is not."""
    values = [exact(part) for part in node.args]
    return (
        len(values) == 2 and values[1] is not None and values[0] is not None and 10 <= values[1] < 60 and values[0] < 24
    )
