r"""Reads the final answer in a response's text: an explicit "Answer:" line, a box, or else the last formula.

Everything takes at most quadratic time in the length of its input: callers pass only the end of a response.
"""

from __future__ import annotations

import re

from ibro_lightning.rewards.mathematics.answers.spelling import ASCII
from ibro_lightning.rewards.mathematics.answers.units import is_known, is_unit_word, measured
from ibro_lightning.rewards.mathematics.answers.vocabulary import words
from ibro_lightning.rewards.mathematics.boxes import boxed_answer
from ibro_lightning.rewards.mathematics.dapo_rule import tidied
from ibro_lightning.rewards.mathematics.gold_text import BOX, THOUSANDS, boxed, canonical_gold

_SPECIAL_TOKEN = re.compile(r"<\|[^|<>\s]{1,64}\|>")
# "**Answer:** 34", "Final answer**: 34", "\textbf{Answer:} 34". The value is the rest of the line or, if that is empty,
# the next non-empty line; or a displayed formula, which may take several lines.
_LABEL = re.compile(r"(?i)\banswer[*_}]{0,4}[ \t]{0,4}[:：]")
_VALUE = re.compile(r"[\s*_}]*(?:\$\$([^$]+)\$\$|\\\[((?:[^\\]|\\(?!\]))+)\\\]|([^\n]+))")
_FORMULA = re.compile(
    r"\$\$([^$]+)\$\$|(?<!\\)\$((?:\\\$|[^$\n])+)(?<!\\)\$|\\\(((?:[^\\\n]|\\(?!\)))+)\\\)|\\\[((?:[^\\]|\\(?!\]))+)\\\]"
)
_STYLE = re.compile(r"\\(?:text|textbf|mathbf|mathrm|textit|boldsymbol|bm)\s*\{([^{}]*)\}")
_JOINED = re.compile(r"\s*,?\s*(?:or|and|to|-|–)\s*")

_QUANTITY = re.compile(
    rf"([-+]?\s?(?:\\?[$€£]\s?)?(?:[0-9]+(?:{THOUSANDS}[0-9]{{3}})*(?:\.[0-9]+)?|\.[0-9]+))(.*)", re.DOTALL
)
_CURRENCY = re.compile(r"\\?[$€£]|\s")
_NUMBER = re.compile(r"-?[0-9]+(?:\.[0-9]+)?")
_UNIT_SIGN = re.compile(r"\s*(?:\\?%|\\?\$|€|°|\^\s*\{?\s*\\circ\s*\}?|\\degree)")
_UNIT_TEXT = re.compile(r"\\(?:text|mathrm|mbox|textnormal)\s*\{([^{}]*)\}")
_UNIT_POWER = re.compile(r"(?:\^\{?[23]\}?|[²³])$")
_UNIT_SPACE = re.compile(r"\\[,;:! ]|~|(?<=[A-Za-z])\.")
_SHORT_UNITS = words("ft in am pm pct the of per sq cu")
_NAME = re.compile(r"(?:\\?[A-Za-z]+(?:_\{?\w{1,9}\}?)?|[A-Za-z]\(\w{1,9}\))\s*=\s*(?=[^=]*$)")
# The text before the last "=" must not hold another answer: "x = 1 or x = 2", "1, x = 2".
_HEDGE = re.compile(r"[,;<>≤≥±≠≈]|\\(?:neq?|leq?|geq?|lt|gt|pm|quad|approx)\b|\b(?:or|and|to)\b")


def without_special_tokens(text: str) -> str:
    """``text`` without special tokens such as ``<|im_end|>``, which decoding may have left in it."""
    return _SPECIAL_TOKEN.sub("", text) if "<|" in text else text


def answer_line(text: str) -> str | None:
    """The line or displayed formula after the last "Answer:"; None if there is none, or if a box comes after it."""
    labels = list(_LABEL.finditer(text))
    value = _VALUE.match(text, labels[-1].end()) if labels else None
    if value is None or BOX.search(text, value.end()):
        return None
    return value[1] or value[2] or value[3]


def bare(value: str) -> str:
    r"""A value without its surroundings: white space, markdown, delimiters, a box, ``\text``, a final period.

    >>> bare(r"** $\boxed{x + 1}$.**")
    'x + 1'
    """
    for _ in range(8):  # each round removes a layer or two, and answers have no more
        before, value = value, canonical_gold(value.strip(" \t\r\n*`").rstrip(",;"))
        value = value.removeprefix("__").removesuffix("__")
        if style := _STYLE.fullmatch(value):
            value = style[1]
        if value == before:
            break
    return value


def final_answer(text: str) -> str:
    """The final answer as written in ``text``; "" if there is none.

    Whichever comes last of an "Answer:" line and a box counts; a formula counts only without either, and only if no
    number follows it. Adjacent answers ("1 or 2") stay one answer, which equals neither.
    """
    text = text.translate(ASCII)
    line = answer_line(text)
    if line is None:
        return _boxed(text) if BOX.search(text) else _last_formula(text)
    if BOX.search(line):
        return _boxed(line)
    formulas = list(_FORMULA.finditer(line))
    if len(formulas) == 1:  # "The largest n is $34$", if nothing else on the line could be the answer
        others = line[: formulas[0].start()] + line[formulas[0].end() :]
        if not re.search(r"[0-9]|\b(?:or|not|either|maybe)\b", others):
            return _content(formulas[0])
    return bare(line)


def spelled(answer: str) -> str:
    """One spelling for all equivalent forms of an answer: numbers without plus sign, thousands separators, unit,
    leading zeros and trailing decimal zeros; other answers as the published rule tidies them. "" stays ""."""
    value = bare(answer.translate(ASCII))
    value = bare(_NAME.sub("", value, count=1)) if _NAME.match(value) else value
    return _quantity(value) or _symbolic(value)


def same_answer(answer: str, gold: str) -> bool:
    """Whether both are spelled alike, or ``answer`` is an equation ending in the number ``gold``; "" equals nothing."""
    value, right = spelled(answer), spelled(gold)
    if value and value == right:
        return True
    before, _, after = bare(answer.translate(ASCII)).rpartition("=")
    return bool(before) and not _HEDGE.search(before) and _quantity(bare(after)) == right != ""


def is_quantity(answer: str) -> bool:
    """Whether the answer is one number, with or without a name (``x = 5``) or a unit (``5 cm``)."""
    return _NUMBER.fullmatch(spelled(answer)) is not None


def _boxed(text: str) -> str:
    """The answer in the last boxes; "" if the last one is not closed."""
    return "" if boxed(text) is None else boxed_answer(text)


def _content(formula: re.Match[str]) -> str:
    return next(group for group in formula.groups() if group is not None)


def _last_formula(text: str) -> str:
    formulas = list(_FORMULA.finditer(text))
    if not formulas or re.search(r"[0-9]", text[formulas[-1].end() :]):
        return ""
    if len(formulas) > 1 and _JOINED.fullmatch(text[formulas[-2].end() : formulas[-1].start()]):
        return f"{_content(formulas[-2])}, {_content(formulas[-1])}"
    return _content(formulas[-1])


def _quantity(value: str) -> str:
    """The number in a number with or without a unit; "" for anything else."""
    match = _QUANTITY.fullmatch(value)
    if match is None or not _is_unit(match[2]):
        return ""
    digits = _CURRENCY.sub("", match[1])
    number = canonical_gold(re.sub(r"^([-+]?)\.", r"\g<1>0.", digits))
    if not _NUMBER.fullmatch(number):
        return ""
    return number.rstrip("0") if "." in number else number


def _is_unit(text: str) -> bool:
    """Whether ``text`` after a number does not change it: a per cent or degree sign, up to four words."""
    unit = _UNIT_SIGN.sub("", text, count=1) if _UNIT_SIGN.match(text) else text
    apart = unit[:1] in {" ", "~", "\\", ""}
    unit = _UNIT_TEXT.sub(r" \1 ", unit).strip()
    if power := _UNIT_POWER.search(unit):
        unit = unit[: power.start()]
    named = _UNIT_SPACE.sub(" ", unit).split()
    if len(named) > 4 or (power and not named) or (named and not apart and not is_unit_word(named[0], spaced=False)):
        return False
    parts = [(word, 1) for word in named if word.lower() not in _SHORT_UNITS]
    found = measured(parts) if parts else (1, ())
    return found is not None and is_known(found[1])


def _symbolic(value: str) -> str:
    value = re.sub(r"\\[dtc]frac", r"\\frac", value.replace("$", ""))
    value = re.sub(r"\\(?:left|right)(?![A-Za-z])|\\[,;:!]", "", value)
    tidy = tidied(value).strip()
    if choice := re.fullmatch(r"\(?([A-Z])\)?", tidy):  # the letter of a multiple choice
        return choice[1]
    # "3 4" must not become 34 by losing its space.
    return " ".join(value.split()) if _NUMBER.fullmatch(tidy) else tidy
