"""Answers in words."""

from __future__ import annotations

import re
import unicodedata

from ibro_lightning.rewards.mathematics.answers.node import Node
from ibro_lightning.rewards.mathematics.answers.rules import Judgement, no, yes
from ibro_lightning.rewards.mathematics.answers.vocabulary import GREEK

_SAME_WORDS = {
    "does not exist": "dne", "undefined": "undefined", "no solutions": "no solution", "none": "no solution",
    "no real solution": "no solution", "no real solutions": "no solution",
}  # fmt: skip


_WORD = re.compile(r"[A-Z]{2,}|[a-z]{3}")
_BESIDE = re.compile(r"[^\w+*/=<>.-]+|(?<![0-9])\.|\.(?![0-9])|_")
"""What is between words: white space and punctuation, but no point in a number, and no letter of any alphabet."""


def same_words(gold: Node, answer: Node) -> Judgement:
    """Whether two answers, at least one in words, say the same: "no solutions" and an empty set do."""
    spoken = [_spoken(node) for node in (gold, answer)]
    if gold.op == answer.op and spoken[0][:1] == spoken[1][:1] != [""]:
        return yes("exact")
    return yes("text") if set(spoken[0]) & set(spoken[1]) - {""} else no("other words")


def _spoken(node: Node) -> list[str]:
    """An answer's words without case, as they stand, and without their article: ``A`` may be a name as well as one, so
    that only ``a`` is left out."""
    if node.op == "text":
        words = " ".join(_BESIDE.sub(" ", unicodedata.normalize("NFC", str(node.args[0]))).split())
        bare = re.sub(r"^(?:[Tt]he|THE|a|an|An) (?=.)", "", words).casefold()
        return [_SAME_WORDS.get(words.casefold(), words.casefold()), _SAME_WORDS.get(bare, bare)]
    if node.op == "set" and not node.args:
        return ["no solution"]
    letters = node.args if node.op == "mul" else (node,)
    if all(part.op == "symbol" or (part.op == "constant" and part.args[0] in ("e", "i")) for part in letters):
        word = "".join(part.args[0] for part in letters)
        return [word.casefold()] if word.islower() or word.isupper() else []  # BAb is no way to write Bab
    return []


def as_written(gold: Node, answer: Node) -> tuple[Node, Node]:
    """Both, with an answer that is one word as the product of its letters, unless the other one is a word, too.

    ``HT`` is not ``TH``, and ``dog`` is not ``god``: a word keeps its order. ``IR`` is the product of I and R.
    """
    if is_word(gold) == is_word(answer):
        return gold, answer
    return _product(gold), _product(answer)


def is_word(node: Node) -> bool:
    """Whether an answer is one word in plain letters, which the tokens hold as one symbol."""
    return node.op == "symbol" and node.args[0] not in GREEK and bool(_WORD.fullmatch(node.args[0]))


def _product(node: Node) -> Node:
    if not is_word(node):
        return node
    letters = (Node("constant", (name,)) if name in "ei" else Node("symbol", (name,)) for name in node.args[0])
    return Node("mul", tuple(letters))
