"""Numbers as they are written: decimals, those that repeat, powers of ten, and numerals of other bases."""

from __future__ import annotations

import re
from fractions import Fraction

from ibro_lightning.rewards.mathematics.answers.node import Decimal, Node, Unread
from ibro_lightning.rewards.mathematics.answers.tokens import Token
from ibro_lightning.rewards.mathematics.answers.vocabulary import BASES

_MAX_DIGITS = 4000
_MAX_EXPONENT = 5000
_MAX_REPEATED = 500
_DIGITS = r"[0-9A-Za-z]+(?:\.[0-9A-Za-z]+)?"
_BASE = r"(?:\{\s*(?:\\text\s*\{)?\s*)?([0-9]+|[a-z]+)[\s}]*"
_NUMERAL = re.compile(rf"\s*\(?\s*(?:\\(?:text|mathrm)\s*\{{)?({_DIGITS})\}}?\s*\)?\s*_\s*{_BASE}$")

_IN_WORDS = re.compile(
    rf"\s*({_DIGITS})\s*(?:\\(?:text|mathrm)\{{\s*)?\(?\s*(?:in )?base[ -]([0-9]+|[a-z]+)\s*\)?\s*\}}?\s*"
)


def numeral(text: str) -> Node | None:
    """``52_8``, ``(101)_2``, ``1A_{16}`` and "52 in base 8"; None for any other text."""
    match = _NUMERAL.match(text) or _IN_WORDS.fullmatch(text)
    return based(match[1], match[2]) if match else None


def based(digits: str, base: str) -> Node | None:
    """A numeral, from its digits and its base in digits or words; None if it is none."""
    number = int(base) if base.isdigit() else BASES.get(base)
    if number is None or not 2 <= number <= 36 or (digits.isalpha() and not digits.isupper()):
        return None
    if any(int(digit, 36) >= number for digit in digits if digit != "."):
        return None
    whole, point, behind = digits.upper().partition(".")
    return Node("based", (whole.lstrip("0") or "0", behind.rstrip("0") if point else "", number))


def in_base_ten(node: Node) -> Node:
    """A numeral of base ten as a number; anything else unchanged."""
    if node.op == "based" and node.args[2] == 10:
        whole, behind, _ = node.args
        return Node("number", (Decimal(Fraction(int(whole + behind), 10 ** len(behind))),))
    return node


def number(token: Token) -> Node:
    """The number of a token."""
    text = token.text
    if token.kind == "repeating":
        return _repeating(text)
    if text[:2].lower() in ("0x", "0b"):
        return Node("number", (Decimal(Fraction(int(text, 0))),))
    mantissa, _, exponent = text.lower().partition("e")
    if len(exponent) > 6 or (exponent and abs(int(exponent)) > _MAX_EXPONENT):
        raise Unread("too large")
    whole, point, behind = mantissa.partition(".")
    if len(mantissa) > _MAX_DIGITS:
        raise Unread("too long a number")
    value = Fraction(int((whole or "0") + behind), 10 ** len(behind)) * Fraction(10) ** int(exponent or 0)
    if not point or not behind:
        return Node("number", (Decimal(value),))
    return Node("number", (Decimal(value, len(behind), len((whole + behind).lstrip("0"))),))


def _repeating(text: str) -> Node:
    match = re.fullmatch(r"([0-9]*)\.([0-9]*)([^0-9].*)", text)
    repeated = re.sub(r"[^0-9]", "", match[3]) if match else ""
    if match is None or not repeated or len(text) > _MAX_REPEATED:
        raise Unread("a decimal that repeats")
    whole, fixed = match[1] or "0", match[2]
    start = Fraction(int(whole + fixed or "0"), 10 ** len(fixed))
    return Node("number", (Decimal(start + Fraction(int(repeated), (10 ** len(repeated) - 1) * 10 ** len(fixed))),))
