r"""The tokens of an answer, whether it is LaTeX, plain text or Unicode; spelling and layout are gone from here on.

>>> [token.text for token in tokens(r"\dfrac{1}{2}\left(x + 1\right)")]
['\\frac', '{', '1', '}', '{', '2', '}', '(', 'x', '+', '1', ')']
>>> [(token.kind, token.text) for token in tokens("12,345 miles or 3e5")]
[('number', '12345'), ('text', 'miles'), ('or', 'or'), ('number', '3e5')]
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from ibro_lightning.rewards.mathematics.answers.node import Ambiguous, Unread
from ibro_lightning.rewards.mathematics.answers.number_words import in_signs
from ibro_lightning.rewards.mathematics.answers.spelling import one_spelling, without_digit_groups
from ibro_lightning.rewards.mathematics.answers.units import is_unit_symbol, is_unit_word
from ibro_lightning.rewards.mathematics.answers.vocabulary import FUNCTIONS, JOINING, PLAIN, SHORT_WORDS, words

_MAX_TOKENS = 2000
_MAX_NESTING = 60


@dataclass(frozen=True, slots=True)
class Token:
    kind: str
    """number, repeating, letter, command, text, or the sign itself."""
    text: str
    spaced: bool = False
    """Whether white space comes before it."""


_STYLED = re.compile(
    r"\\(text|textbf|textit|textrm|textsf|textnormal|mathrm|mathbf|mathit|mathsf|mbox|hbox|operatorname\*?|boldsymbol"
    r"|bm|mathcal|mathbb|emph|underline)\s*\{((?:[^{}]|\{[^{}]*\})*)\}"
)
_TOKEN = re.compile(
    r"(?P<space>(?:\s|\\[,;:!> ]|\\q?quad|~|\\!|\{\})+)"
    r"|(?P<repeating>[0-9]*\.[0-9]*\\overline\s*(?:\{\s*[0-9]+\s*\}|[0-9])"
    r"|[0-9]*\.[0-9]*\\dot\s*(?:\{[0-9]\}|[0-9])[0-9]*\\dot\s*(?:\{[0-9]\}|[0-9])"
    r"|[0-9]*\.[0-9]*\\(?:bar|dot)\s*(?:\{[0-9]+\}|[0-9])|[0-9]*\.\([0-9]+\))"
    r"|(?P<number>0[xX][0-9a-fA-F]+(?![0-9A-Za-z])|0[bB][01]+(?![0-9A-Za-z])"
    r"|(?:[0-9]+(?:\.[0-9]+)?|\.[0-9]+)[eE][-+]?[0-9]+(?![0-9A-Za-z.])|[0-9]+\.(?![0-9])|[0-9]+(?:\.[0-9]+)?|\.[0-9]+)"
    r"|(?P<styled>\x02[0-9]+\x03)"
    r"|(?P<command>\\(?:begin|end)\s*\{[A-Za-z]+\*?\}|\\[A-Za-z]+|\\[{}|%$#&_\\])"
    r"|(?P<word>[A-Za-z]{2,})"
    r"|(?P<letter>[A-Za-z]'*)"
    r"|(?P<sign>[-+*/^_=<>(){}\[\]|,;:.!%$€£¥?&'\"@])"
)


def tokens(text: str) -> list[Token]:
    """The tokens of an answer. Raises :class:`Unread` for what no answer has, or too much of it."""
    if len(text) > 20 * _MAX_TOKENS:
        raise Ambiguous("too long")
    if "\x02" in text or "\x03" in text:  # the marks of styled tokens
        raise Unread("control characters")
    styled: list[Token] = []
    text = _STYLED.sub(lambda match: _unstyled(match, styled), in_signs(one_spelling(text)))
    text = without_digit_groups(text)
    found: list[Token] = []
    position, spaced, depth = 0, False, 0
    while position < len(text):
        match = _TOKEN.match(text, position)
        if match is None:
            raise Unread(f"no answer has {text[position]!r}")
        position, kind = match.end(), str(match.lastgroup)
        if kind == "space":
            spaced = True
            continue
        if kind == "word" and _stands_alone(match, found):
            found.append(Token("letter", match[0], spaced))
            spaced = False
            continue
        raised = text.startswith(("^", "_"), position)
        found += _tokens_of(kind, match[0], spaced, styled, found, raised)
        depth += (match[0] in ("(", "[", "{", r"\{")) - (match[0] in (")", "]", "}", r"\}"))
        if len(found) > _MAX_TOKENS or depth > _MAX_NESTING:
            raise Ambiguous("too long or too deeply nested")
        spaced = False
    return found


def _tokens_of(
    kind: str, text: str, spaced: bool, styled: list[Token], before: list[Token], raised: bool
) -> list[Token]:
    if kind == "styled":
        token = styled[int(text[1:-1])]
        return [Token(token.kind, token.text, True)] if token.text else []
    if kind in ("number", "repeating"):
        return [Token(kind, re.sub(r"\s", "", text).rstrip(".") if kind == "number" else text, spaced)]
    if kind == "word":
        return _of_word(text, spaced, before, raised)
    if kind == "sign":
        return [Token(text, text, spaced)]
    if kind == "command":
        text = re.sub(r"\s", "", text)
        return [
            Token("%", "%", spaced)
            if text == r"\%"
            else Token("$", "$", spaced)
            if text == r"\$"
            else Token(kind, text, spaced)
        ]
    return [Token(kind, text, spaced)]


_ALONE = re.compile(r"[A-Z]{2,}|(?=[a-z]*[aeiou])(?![abcdwxyz]*$)[a-z]{3}(?![a-z])")
_ENDS = re.compile(r"\s*(?:$|[,;.]|\\\}|and\b|or\b)")


def _stands_alone(match: re.Match[str], before: list[Token]) -> bool:
    """Whether a word that would be a product of its letters is an entry of its own: ``HT, TH`` and ``dog`` are words
    whose order matters; ``xyz`` and the ``AB`` of ``2AB`` are products."""
    word = match[0]
    if not _ALONE.fullmatch(word) or word in PLAIN or word in JOINING or word.lower() in SHORT_WORDS:
        return False
    starts = not before or before[-1].kind in (",", ";", "and", "or") or before[-1].text == r"\{"
    return starts and _ENDS.match(match.string, match.end()) is not None


def _of_word(word: str, spaced: bool, before: list[Token], raised: bool) -> list[Token]:
    """A run of letters: a function, "and", a word, or a product of symbols such as ``ab``, also if it is ``raised`` to
    a power or has an index."""
    if word in JOINING:
        return [Token(JOINING[word], word, spaced)]
    last = before[-1] if before else Token("", "")
    number = last.kind in ("number", "repeating") or last.text in ("}", ")", "%")
    if number and is_unit_word(word, spaced):  # also "45 min", which is no minimum
        return [Token("text", word, spaced)]
    if word in PLAIN:
        plain = PLAIN[word]
        return [Token("%", "%", spaced) if plain == r"\%" else Token("command", plain, spaced)]
    if last.text != "_" and (found := _glued(word)):
        return found
    tight = bool(before) and not spaced and (len(word) == 2 or (number and len(word) <= 6))
    product = last.text in _TAKES_LETTERS or _is_product(word) or tight or set(word) <= set("abcdwxyz")
    product = product or (raised and len(word) <= 6 and not is_unit_word(word, True))
    if product and last.text != "_":
        return [Token("letter", letter, spaced and place == 0) for place, letter in enumerate(word)]
    return [Token("text", word, spaced)]


_GLUED_PARTS = re.compile(r"sin|cos|tan|sec|csc|cot|ln|log|pi|exp|[a-zR]")
_GLUED_WORDS = words("cost pint pine pins spin logs tang sing sink pie pig pit pin pip pic tank cosy slog blog clog")


def _glued(word: str) -> list[Token]:
    """``lnx``, ``xlnx`` and ``sinxcosx``: functions and letters without a space between them; [] for other words."""
    parts = _GLUED_PARTS.findall(word)
    kinds = "".join("f" if len(part) > 1 else "x" for part in parts)
    if word in _GLUED_WORDS or "".join(parts) != word or "f" not in kinds or len(word) > 24:
        return []
    if "xxx" in kinds or kinds.startswith("xx") or kinds.endswith("xx"):
        return []
    return [Token("command", f"\\{part}") if len(part) > 1 else Token("letter", part) for part in parts]


def _is_product(word: str) -> bool:
    """``ab``, ``mg`` and ``xyz`` are products; ``even``, ``SAS`` and ``Bob`` are words."""
    if word.isupper():
        return True
    return len(word) <= 3 and word.lower() not in SHORT_WORDS


# What takes the letters behind it one by one.
_TAKES_LETTERS = words(r"\frac \sqrt \binom \vec \overline \angle \triangle ^")


def _unstyled(match: re.Match[str], styled: list[Token]) -> str:
    r"""``\text{…}``: mathematics where it is some, else a mark for one token of text."""
    command, content = match[1], match[2].strip().strip("~")
    content = re.sub(r"\\[,;:! ]", " ", content).strip()
    if command == "mathbb":
        styled.append(Token("command", rf"\mathbb{content}"))
    elif joining := JOINING.get(content.strip(",. ").lower()):
        styled.append(Token(joining, content))
    elif PLAIN.get(content) == r"\%":
        return r" \% "
    elif _is_unit(command, content, match):
        return _unit_tokens(content, styled)
    elif content in PLAIN:
        return f" {PLAIN[content]} "
    elif content in FUNCTIONS:
        return f" \\{content} "
    elif quantity := re.fullmatch(r"([0-9][0-9.,]*)\s*([A-Za-z]{2,}[^\\]*)", content):
        return f" {quantity[1]} " + _unit_tokens(quantity[2], styled)
    elif re.fullmatch(r"\(?[A-Za-z]\)?'*|[-+*/0-9.,:()%\s]*", content):
        if not content.strip(", "):
            return " "
        if command in ("mathbf", "boldsymbol", "bm") and content.islower():
            return rf"\vec{{{content}}}"
        return f" {content} "
    elif re.search(r"[\\^_=<>{}]", content) or (re.search(r"[0-9]", content) and re.search(r"[-+*/]", content)):
        return f" {content} "
    else:
        styled.append(Token("text", content))
    return f"\x02{len(styled) - 1}\x03"


_UNIT_TEXT = re.compile(r"(?:[A-Za-z]+|\^\s*\{?-?[0-9]\}?|/|\\cdot|[\s.*])+")


def _is_unit(command: str, content: str, match: re.Match[str]) -> bool:
    """Behind a number, ``\\text{ m}``, ``\\mathrm{m/s^2}`` and ``\\text{ min}`` are units; ``\\mathrm{e}`` is none."""
    if not command.startswith(("text", "mathrm", "mbox", "hbox")) or not _follows_number(match):
        return False
    names = re.findall(r"[A-Za-z]+", content)
    if set(names) & (FUNCTIONS - {"min", "sec", "deg"}):
        return False
    if not names or not _UNIT_TEXT.fullmatch(content) or content in JOINING:
        return False
    upright_letter = len(content) == 1 and command.startswith("mathrm")
    if upright_letter and match.string[: match.start()][-1:].isdigit():  # 2\mathrm{e} has no space as units have
        return False
    return all(is_unit_symbol(name) for name in names)


def _unit_tokens(content: str, styled: list[Token]) -> str:
    """The text of a unit, with marks in place of its words."""

    def mark(word: re.Match[str]) -> str:
        joining = JOINING.get(word[0])
        styled.append(Token(joining, word[0]) if joining else Token("text", word[0]))
        return f" \x02{len(styled) - 1}\x03 "

    return re.sub(r"[A-Za-z]+", mark, content)


def _follows_number(match: re.Match[str]) -> bool:
    before = match.string[: match.start()].rstrip(" ~").removesuffix("\\").rstrip()
    before = re.sub(r"\\[,;:!]$", "", before).rstrip()
    return before[-1:].isdigit() or before.endswith(("}", "\x03", "/", r"\cdot"))
