"""Answers in words."""

from __future__ import annotations

import re

from ibro_lightning.rewards.mathematics.answers.node import Node
from ibro_lightning.rewards.mathematics.answers.rules import Judgement, no, yes

_SAME_WORDS = {
    "does not exist": "dne", "undefined": "undefined", "no solutions": "no solution", "none": "no solution",
    "no real solution": "no solution", "no real solutions": "no solution",
}  # fmt: skip


def same_words(gold: Node, answer: Node) -> Judgement:
    """Whether two answers, at least one in words, say the same: "no solutions" and an empty set do."""
    words = [_spoken(node) for node in (gold, answer)]
    return yes("text") if words[0] == words[1] != "" else no("other words")


def _spoken(node: Node) -> str:
    if node.op == "text":
        words = re.sub(r"[^0-9a-z+*/=<>-]+", " ", str(node.args[0])).strip()
        words = re.sub(r"^(?:the|a|an) ", "", words)
        return _SAME_WORDS.get(words, words)
    if node.op == "set" and not node.args:
        return "no solution"
    letters = node.args if node.op == "mul" else (node,)
    if all(part.op == "symbol" or (part.op == "constant" and part.args[0] in ("e", "i")) for part in letters):
        return "".join(part.args[0] for part in letters).lower()
    return ""
