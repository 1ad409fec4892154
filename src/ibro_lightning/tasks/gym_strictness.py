"""What an answer at full marks must be, beyond what reasoning-gym's scorers look at (version 0.1.25).

A scorer that reads a part of an answer, or rounds it, gives full marks to answers that are wrong. Each check here sees
an answer with full marks and decides whether it deserves them; it never makes a wrong answer right.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Mapping
from fractions import Fraction
from typing import Any

from ibro_lightning.rewards.mathematics.answers.equality import compare
from ibro_lightning.rewards.mathematics.answers.grammar import read
from ibro_lightning.rewards.mathematics.answers.node import Unread
from ibro_lightning.rewards.mathematics.answers.rules import Rules

Check = Callable[[str, str], bool]
"""Whether an answer deserves full marks, from the answer and the gold."""

_CELLS = r"(?:-?[0-9]+[ \t]*)+"
_BITS = r"[ \t]*[01](?:[ \t]+[01])*[ \t]*"
_PERSON = r"([A-Z][a-z]+) is an? ([a-z]+)"
_TIME = r"[0-9]{1,2}:[0-9]{2}(?::[0-9]{2}(?:\.[0-9]{1,3})?)?"
_MOVE = r"Move disk [0-9]+ from Peg [0-9]+ to Peg [0-9]+"
_DURATION = rf"(?:[0-9]+ days?, ?)?{_TIME}|[0-9]+(?: days?)?"


def _same_number(answer: str, gold: str) -> bool:
    """By the rules of the symbolic verifier: a decimal that is not the gold must round to it, from 6 digits on."""
    try:
        return compare(read(gold), read(answer), Rules()).same
    except Unread:
        return False


def _same_bare_number(answer: str, gold: str) -> bool:
    return re.fullmatch(r"[-+0-9.,/ ]+", answer) is not None and _same_number(answer, gold)


def _same_complex(answer: str, gold: str) -> bool:
    """Engineers write j."""
    return _same_number(re.sub(r"(?<=[0-9 +-])j\b", "i", answer), gold)


def _same_text(answer: str, gold: str) -> bool:
    return answer.strip().casefold() == gold.strip().casefold()


def _same_words(answer: str, gold: str) -> bool:
    return [word.strip() for word in answer.split(",")] == [word.strip() for word in gold.split(",")]


def _same_listed_numbers(answer: str, gold: str) -> bool:
    try:
        lists = [[Fraction(str(number)) for number in ast.literal_eval(text)] for text in (answer, gold)]
    except (ValueError, SyntaxError, TypeError, ZeroDivisionError):
        return False
    return lists[0] == lists[1]


def _as_many_numbers(answer: str, gold: str) -> bool:
    number = r"\s*-?(?:[0-9]+\.?[0-9]*|\.[0-9]+)\s*"
    return re.fullmatch(rf"{number}(?:,{number})*", answer) is not None and answer.count(",") == gold.count(",")


def _rounds_to_two_decimals(answer: str, gold: str) -> bool:
    rows = [[[Fraction(number) for number in row.split()] for row in text.split("\n")] for text in (answer, gold)]
    pairs = [(a, g) for left, right in zip(*rows, strict=True) for a, g in zip(left, right, strict=True)]
    return all(abs(a - g) <= Fraction(5, 1000) for a, g in pairs)


def _lowest_terms(answer: str, gold: str) -> bool:
    fraction = re.fullmatch(r"\\[dt]?frac\{(-?[0-9]+)\}\{([0-9]+)\}|(-?[0-9]+)/([0-9]+)", answer.strip(" $\n"))
    return fraction is not None


def _one_statement_each(answer: str, gold: str) -> bool:
    """Every inhabitant once, and nothing else."""
    if not re.fullmatch(rf"{_PERSON}(?:(?:,? and |, ){_PERSON})*\.?", answer.strip()):
        return False
    names = [name for name, _ in re.findall(_PERSON, answer)]
    return len(set(names)) == len(names)


def _each_letter_once(answer: str, gold: str) -> bool:
    items = [re.fullmatch(r"\s*([A-Z])\s*=\s*([0-9])\s*", item) for item in answer.split(",")]
    letters = [item[1] for item in items if item is not None]
    return len(letters) == len(items) == len(set(letters))


def _looks(pattern: str) -> Check:
    """The whole answer has this form; what it says is the scorer's to judge."""
    compiled = re.compile(pattern)
    return lambda answer, gold: compiled.fullmatch(answer.strip()) is not None


STRICTER: Mapping[str, Check] = {
    "coin_flip": _same_number,  # takes what begins like the gold, and errors up to 1e-4
    "complex_arithmetic": _same_complex,  # takes nan
    "cryptarithm": _each_letter_once,  # takes the last of several values
    "decimal_arithmetic": _same_number,  # takes errors up to the number of decimals that the problem may have
    "fraction_simplification": _lowest_terms,  # takes what follows the fraction
    "game_of_life_halting": _same_text,  # takes any text
    "gsm_symbolic": _same_bare_number,  # takes the first number without its sign
    "kakurasu": _looks(rf"{_BITS}(?:\n{_BITS})*"),  # takes digits out of other text
    "knights_knaves": _one_statement_each,  # takes contradictions and what follows
    "letter_jumble": _same_text,  # takes further words
    "number_format": _same_number,  # takes errors below 0.01
    "number_sorting": _same_listed_numbers,  # takes numbers rounded to integers
    "polynomial_equations": _as_many_numbers,  # leaves out what it cannot read
    "pool_matrix": _rounds_to_two_decimals,  # takes errors of 1 %
    "quantum_lock": _looks(r"[A-Z](?:\s*(?:→|->)\s*[A-Z])*"),  # takes letters out of other text
    "sokoban": _looks(r"[UDLRudlr]+"),  # takes letters out of other text
    "spell_backward": _same_text,  # rounds similarity up
    "survo": _looks(rf"{_CELLS}(?:\n{_CELLS})*"),  # takes what follows
    "time_intervals": _looks(_DURATION),  # takes what follows
    "tower_of_hanoi": _looks(rf"{_MOVE}(?:\s*\n\s*{_MOVE})*"),  # takes moves out of other text
    "word_sorting": _same_words,  # takes further words
}  # fmt: skip


def deserves_full_marks(name: str, answer: str, entry: Mapping[str, Any]) -> bool:
    """Whether an answer to which the scorer of a dataset gives full marks is right."""
    check = STRICTER.get(name)
    gold = entry["answer"]
    if check is None or not isinstance(gold, str) or answer.strip() == gold.strip():
        return True
    try:
        return check(answer, gold)
    except (ValueError, ZeroDivisionError):
        return False
