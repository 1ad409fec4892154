r"""Reads the final answer in a response's text: an explicit "Answer:" line, a box, or else the last formula.

Everything takes at most quadratic time in the length of its input: callers pass only the end of a response.
"""

from __future__ import annotations

import re

from ibro_lightning.rewards.mathematics.dapo_rule import tidied
from ibro_lightning.rewards.mathematics.gold_text import BOX, THOUSANDS, boxed, canonical_gold


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


_SPECIAL_TOKEN = re.compile(r"<\|[^|<>\s]{1,64}\|>")
# "**Answer:** 34", "Final answer**: 34", "\textbf{Answer:} 34". The value is the rest of the line or, if that is empty,
# the next non-empty line; or a displayed formula, which may take several lines.
_LABEL = re.compile(r"(?i)\banswer[*_}]{0,4}[ \t]{0,4}[:：]")
_VALUE = re.compile(r"[\s*_}]*(?:\$\$([^$]+)\$\$|\\\[((?:[^\\]|\\(?!\]))+)\\\]|([^\n]+))")
_FORMULA = re.compile(
    r"\$\$([^$]+)\$\$|(?<!\\)\$((?:\\\$|[^$\n])+)(?<!\\)\$|\\\(((?:[^\\\n]|\\(?!\)))+)\\\)|\\\[((?:[^\\]|\\(?!\]))+)\\\]"
)
_STYLE = re.compile(r"\\(?:text|textbf|mathbf|mathrm|textit|boldsymbol|bm)\s*\{([^{}]*)\}")
_NEAR = 20
"""Up to so many characters apart, two boxes are one answer in two parts, such as "1 or 2"."""
_TOUCHING = re.compile(r"\s*(?:[\^+*/]|\\(?:cdot|times)\b)\s*[\w\\({].*")
_JOINED = re.compile(r"\s*,?\s*(?:or|and|to|-|–)\s*")

# Full-width forms, spaces that are not ASCII, and the true minus sign.
_ASCII = {code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)}
_ASCII |= {ord(space): ord(" ") for space in "\u3000\u00a0\u202f\u2009"} | {0x2212: ord("-")}

_QUANTITY = re.compile(
    rf"([-+]?\s?(?:\\?[$€£]\s?)?(?:[0-9]+(?:{THOUSANDS}[0-9]{{3}})*(?:\.[0-9]+)?|\.[0-9]+))(.*)", re.DOTALL
)
_CURRENCY = re.compile(r"\\?[$€£]|\s")
_NUMBER = re.compile(r"-?[0-9]+(?:\.[0-9]+)?")
_UNIT_SIGN = re.compile(r"\s*(?:\\?%|\\?\$|€|°|\^\s*\{?\s*\\circ\s*\}?|\\degree)")
_UNIT_TEXT = re.compile(r"\\(?:text|mathrm|mbox|textnormal)\s*\{([^{}]*)\}")
_UNIT_POWER = re.compile(r"(?:\^\{?[23]\}?|[²³])$")
_UNIT_SPACE = re.compile(r"\\[,;:! ]|~|(?<=[A-Za-z])\.")
_SHORT_UNITS = _words(
    "cm mm km m ft in kg mg g lb lbs oz mi yd ml s h hr hrs min sec mph kmh am pm ha pct men day way pie cup egg box "
    "cat dog pen car bag a the of per sq cu"
)
# Words that change the number before them, or make it uncertain.
_NOT_UNITS = _words(
    "more less than over under about nearly almost plus minus times divided modulo squared cubed factorial sqrt root "
    "half halves third thirds quarter quarters fourth fourths fifth fifths sixth sixths tenth tenths hundred hundreds "
    "hundredth hundredths thousand thousands thousandth thousandths million millions billion billions trillion dozen "
    "dozens alpha beta gamma delta theta lambda sigma omega epsilon zeta kappa infinity choose base binary either "
    "maybe else possibly perhaps approximately"
)
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
    text = text.translate(_ASCII)
    line = answer_line(text)
    if line is None:
        return _box(text) if BOX.search(text) else _last_formula(text)
    if BOX.search(line):
        return _box(line)
    formulas = list(_FORMULA.finditer(line))
    if len(formulas) == 1:  # "The largest n is $34$", if nothing else on the line could be the answer
        others = line[: formulas[0].start()] + line[formulas[0].end() :]
        if not re.search(r"[0-9]|\b(?:or|not|either|maybe)\b", others):
            return _content(formulas[0])
    return bare(line)


def spelled(answer: str) -> str:
    """One spelling for all equivalent forms of an answer: numbers without plus sign, thousands separators, unit,
    leading zeros and trailing decimal zeros; other answers as the published rule tidies them. "" stays ""."""
    value = bare(answer.translate(_ASCII))
    value = bare(_NAME.sub("", value, count=1)) if _NAME.match(value) else value
    return _quantity(value) or _symbolic(value)


def same_answer(answer: str, gold: str) -> bool:
    """Whether both are spelled alike, or ``answer`` is an equation ending in the number ``gold``; "" equals nothing."""
    value, right = spelled(answer), spelled(gold)
    if value and value == right:
        return True
    before, _, after = bare(answer.translate(_ASCII)).rpartition("=")
    return bool(before) and not _HEDGE.search(before) and _quantity(bare(after)) == right != ""


def is_quantity(answer: str) -> bool:
    """Whether the answer is one number, with or without a name (``x = 5``) or a unit (``5 cm``)."""
    return _NUMBER.fullmatch(spelled(answer)) is not None


def _content(formula: re.Match[str]) -> str:
    return next(group for group in formula.groups() if group is not None)


def _last_formula(text: str) -> str:
    formulas = list(_FORMULA.finditer(text))
    if not formulas or re.search(r"[0-9]", text[formulas[-1].end() :]):
        return ""
    if len(formulas) > 1 and _JOINED.fullmatch(text[formulas[-2].end() : formulas[-1].start()]):
        return f"{_content(formulas[-2])}, {_content(formulas[-1])}"
    return _content(formulas[-1])


def _box(text: str) -> str:
    """The last box with the sign or operator that touches it; and those right before it, if they differ."""
    contents: list[str] = []
    next_start = len(text)
    while (inside := boxed(text)) is not None:
        start = [opening.start() for opening in BOX.finditer(text)][-1]
        end = text.find(inside, start) + len(inside) + 1
        if contents and next_start - end > _NEAR:
            break
        whole = f"-{inside}" if text[start - 1 : start] in {"-", "−"} else inside
        if power := _TOUCHING.match(text, end):
            whole += power[0]
        if whole not in contents:
            contents.append(whole)
        text, next_start = text[:start], start
    return ", ".join(reversed(contents))


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
    words = _UNIT_SPACE.sub(" ", unit).lower().split()
    if len(words) > 4 or (power and not words):
        return False
    return all(
        word in _SHORT_UNITS
        or (apart and len(word) > 3 and word.isascii() and word.isalpha() and word not in _NOT_UNITS)
        for word in words
    )


def _symbolic(value: str) -> str:
    value = re.sub(r"\\[dtc]frac", r"\\frac", value.replace("$", ""))
    value = re.sub(r"\\(?:left|right)(?![A-Za-z])|\\[,;:!]", "", value)
    tidy = tidied(value).strip()
    if choice := re.fullmatch(r"\(?([A-Z])\)?", tidy):  # the letter of a multiple choice
        return choice[1]
    # "3 4" must not become 34 by losing its space.
    return " ".join(value.split()) if _NUMBER.fullmatch(tidy) else tidy
