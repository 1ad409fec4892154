"""How golds and answers are read: by our parser, else by the library math-verify, else as text."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from ibro_lightning.rewards.mathematics import expressions
from ibro_lightning.rewards.mathematics.answers.grammar import read
from ibro_lightning.rewards.mathematics.answers.node import Ambiguous, Node, Unread
from ibro_lightning.rewards.mathematics.answers.quantities import spelled
from ibro_lightning.rewards.mathematics.extraction import Extract, extracts
from ibro_lightning.rewards.mathematics.response_text import BOXED, COMMAND, DELIMITED
from ibro_lightning.rewards.mathematics.sentences import words_in

_SENTENCE = re.compile(r"[A-Za-z]{2,}\s+[A-Za-z]{2,}")
_ONE_LETTER = r"[msghlLNJWVAK](?:\^\{?[23]\}?)?"
_LETTER_UNIT = re.compile(rf"(-?[0-9][0-9.,/]*)\s+({_ONE_LETTER}(?:\s*/\s*{_ONE_LETTER})?)")


@dataclass(frozen=True)
class Reading:
    """An answer, as it stands in a text and as it is read: by our rules, else by the library, else as text."""

    text: str
    node: Node | None
    extract: Extract | None = None
    library: Any = None

    def spelled(self) -> str:
        """One string for equal numbers, the text without its white space for anything else."""
        if self.node is not None:
            return spelled(self.node) or " ".join(self.text.split())[:200]
        return expressions.spelled((self.library, self.text)) if self.library is not None else self.text[:200]


@lru_cache(maxsize=4096)
def read_gold(gold: str, match_types: tuple[str, ...]) -> Reading:
    """The gold as it is read; cached, since all responses to a prompt share it."""
    text = _delimited(gold, match_types)
    if (found := _reading(text, match_types, explicit=text != gold)) is None:
        raise ValueError(_unreadable(gold))
    if found.node is not None and found.node.op == "mul" and (quantity := with_unit(gold)):
        return Reading(found.text, quantity, found.extract)
    return found


@lru_cache(maxsize=4096)
def library_gold(gold: str, match_types: tuple[str, ...]) -> tuple[tuple[Any, ...], str]:
    """The gold as the library's expressions and as one string."""
    if not (found := expressions.parse(_delimited(gold, match_types), match_types)):
        raise ValueError(_unreadable(gold))
    return found, expressions.spelled(found)


def _delimited(gold: str, match_types: tuple[str, ...]) -> str:
    if "latex" in match_types and not DELIMITED.search(gold) and not _SENTENCE.search(COMMAND.sub(".", gold)):
        return f"${' '.join(gold.split())}$"
    return gold


def _unreadable(gold: str) -> str:
    return f"the gold answer {gold[:200]!r} cannot be read as mathematics: correct it, or drop the row"


def read_answer(text: str, match_types: tuple[str, ...], golds: Sequence[Reading]) -> Reading | None:
    """The answer in a response: where a gold is in words, and nothing is marked, what "the answer is" in words, too."""
    in_words = any(gold.node is not None and gold.node.op in ("text", "symbol") for gold in golds)
    if in_words and not BOXED.search(text) and (words := words_in(text)):
        try:
            return Reading(words, read(words))
        except Unread:
            return Reading(words, None)
    return _reading(text, match_types)


def _reading(text: str, match_types: tuple[str, ...], explicit: bool = False) -> Reading | None:
    """The first of a text's likely answers that can be read; else the first of them, as text; None without any. An
    answer that is ``explicit``, as one in a box, is the answer, whether it can be read or not."""
    first: Reading | None = None
    explicit = explicit or BOXED.search(text) is not None
    for extract in extracts(text, match_types):
        if extract.kind == "string":
            return Reading(extract.text, Node("text", (extract.text.lower(),)), extract)
        try:
            return Reading(extract.text, read(extract.text), extract)
        except Ambiguous:
            return Reading(extract.text, None)
        except Unread:
            if (found := _quietly(extract)) is not None:
                return Reading(extract.text, None, extract, found)
        if first is None and extract.text.strip():
            first = Reading(extract.text, None)
            if explicit:
                break
    return first


def library_expression(reading: Reading) -> Any:
    """What the library reads where the answer stands; None if it reads nothing there."""
    return reading.library if reading.library is not None or reading.extract is None else _quietly(reading.extract)


def _quietly(extract: Extract) -> Any:
    try:
        return extract.library()
    except MemoryError:
        raise
    except Exception:  # hostile text makes the library, its parser and sympy raise almost anything
        return None


def with_unit(text: str) -> Node | None:
    """A number with a unit of one letter, or of one per another: ``5 m``, ``5 m/s``, where the gold has a unit."""
    match = _LETTER_UNIT.fullmatch(text.strip().strip("$"))
    return read(rf"{match[1]}\text{{ {match[2]}}}") if match else None
