r"""The tokens of an answer, whether it is LaTeX, plain text or Unicode; spelling and layout are gone from here on.

>>> [token.text for token in tokens(r"\dfrac{1}{2}\left(x + 1\right)")]
['\\frac', '{', '1', '}', '{', '2', '}', '(', 'x', '+', '1', ')']
>>> [(token.kind, token.text) for token in tokens("12,345 miles or 3e5")]
[('number', '12345'), ('text', 'miles'), ('or', 'or'), ('number', '3e5')]
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from ibro_lightning.rewards.mathematics.answers.node import Ambiguous, Unread
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


_UNICODE = {
    **dict(zip("−–—‒﹣－", "------", strict=True)),
    "×": r"\times ",
    "·": r"\cdot ",
    "⋅": r"\cdot ",
    "∙": r"\cdot ",
    "∗": "*",
    "÷": r"\div ",
    "⁄": "/",
    "∕": "/",
    "≤": r"\le ",
    "≥": r"\ge ",
    "⩽": r"\le ",
    "⩾": r"\ge ",
    "≠": r"\ne ",
    "≈": r"\approx ",
    "±": r"\pm ",
    "∓": r"\mp ",
    "∞": r"\infty ",
    "∪": r"\cup ",
    "∩": r"\cap ",
    "∈": r"\in ",
    "∅": r"\emptyset ",
    "∖": r"\setminus ",
    "√": r"\sqrt ",
    "∛": r"\cbrt ",
    "°": r"^\circ ",
    "º": r"^\circ ",
    "′": "'",
    "’": "'",
    "π": r"\pi ",
    "⟨": r"\langle ",
    "⟩": r"\rangle ",
    "…": r"\ldots ",
    "→": r"\to ",
    "½": r"\frac{1}{2}",
    "¼": r"\frac{1}{4}",
    "¾": r"\frac{3}{4}",
    "⅓": r"\frac{1}{3}",
    "⅔": r"\frac{2}{3}",
    "ℝ": r"\mathbb{R}",
    "ℤ": r"\mathbb{Z}",
    "ℕ": r"\mathbb{N}",
    "ℚ": r"\mathbb{Q}",
    "ℂ": r"\mathbb{C}",
    "⌊": r"\lfloor ",
    "⌋": r"\rfloor ",
    "⌈": r"\lceil ",
    "⌉": r"\rceil ",
    "α": r"\alpha ",
    "β": r"\beta ",
    "γ": r"\gamma ",
    "δ": r"\delta ",
    "θ": r"\theta ",
    "λ": r"\lambda ",
    "μ": r"\mu ",
    "σ": r"\sigma ",
    "φ": r"\phi ",
    "ω": r"\omega ",
    "ε": r"\epsilon ",
    "ρ": r"\rho ",
    "τ": r"\tau ",
    "Δ": r"\Delta ",
    "⅛": r"\frac{1}{8}",
    "⅜": r"\frac{3}{8}",
    "⅝": r"\frac{5}{8}",
    "⅞": r"\frac{7}{8}",
    "⅕": r"\frac{1}{5}",
    "⅖": r"\frac{2}{5}",
    "⅗": r"\frac{3}{5}",
    "⅘": r"\frac{4}{5}",
    "⅙": r"\frac{1}{6}",
    "⅚": r"\frac{5}{6}",
    "∨": r"\lor ",
    "∧": r"\land ",
    "∠": r"\angle ",
    "¢": r"\text{ cents}",
    **dict.fromkeys("\u00a0\u2009\u202f\u2003\u2002\u3000\u2007", r"\,"),
    **dict.fromkeys("\u200b\u2061\u2062\u2063\ufeff", ""),
}
_SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿ", "0123456789+-n")
_SUBSCRIPTS = str.maketrans("₀₁₂₃₄₅₆₇₈₉", "0123456789")
_FULL_WIDTH = {code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)}
_TABLE = str.maketrans(_UNICODE)

_SIZES = re.compile(
    r"\\(?:m?left|m?right|middle)\s*\.|\\(?:m?left|m?right|middle|[bB]igg?[lrm]?|displaystyle|textstyle|scriptstyle|limits"
    r"|nolimits|phantom\{[^{}]*\}|hspace\*?\{[^{}]*\}|vspace\*?\{[^{}]*\}|label\{[^{}]*\}|tag\*?\{[^{}]*\}|strut|null"
    r"|(?:text)?color\{[^{}]*\}|bf|rm|it|sf)(?![A-Za-z])"
)
_SPELLINGS: list[tuple[re.Pattern[str], str | Callable[[re.Match[str]], str]]] = [
    (re.compile(r"\\[dtc]frac(?![A-Za-z])"), r"\\frac"),
    (re.compile(r"\\(?:nice|s|x)frac(?![A-Za-z])"), r"\\frac"),
    (re.compile(r"\\[dt]binom(?![A-Za-z])"), r"\\binom"),
    (re.compile(r"\\(?:textdollar|dollar)(?![A-Za-z])"), r"\\$"),
    (re.compile(r"\\leq(?:slant|q)?|\\le(?![A-Za-z])"), r"\\le "),  # also \leqx, which LaTeX would not take
    (re.compile(r"\\geq(?:slant|q)?|\\ge(?![A-Za-z])"), r"\\ge "),
    (re.compile(r"\\neq|\\ne(?![A-Za-z])|\\not\s*="), r"\\ne "),
    (re.compile(r"\\lt(?![A-Za-z])"), "<"),
    (re.compile(r"\\gt(?![A-Za-z])"), ">"),
    (re.compile(r"<="), r"\\le "),
    (re.compile(r">="), r"\\ge "),
    (re.compile(r"!="), r"\\ne "),
    (re.compile(r"\\(?:lbrace|lbrack|lparen)(?![A-Za-z])"), lambda m: {"e": r"\{", "k": "[", "n": "("}[m[0][-1]]),
    (re.compile(r"\\(?:rbrace|rbrack|rparen)(?![A-Za-z])"), lambda m: {"e": r"\}", "k": "]", "n": ")"}[m[0][-1]]),
    (re.compile(r"\\[lr]?vert(?![A-Za-z])"), "|"),
    (re.compile(r"\\(?:degree|textdegree)(?![A-Za-z])|\^\s*\{\s*\\circ\s*\}|\^\s*\\circ(?![A-Za-z])"), r"\\degree "),
    (re.compile(r"\\(?:ast|star)(?![A-Za-z])|\*\*?"), lambda m: "^" if m[0] == "**" else "*"),
    (re.compile(r"\\(?:varnothing|emptyset)(?![A-Za-z])"), r"\\emptyset "),
    (re.compile(r"\\(?:approx|thickapprox|simeq|approxeq)(?![A-Za-z])|~="), r"\\approx "),
    (re.compile(r"\\(?:dots[cbmio]?|cdots|ldots)(?![A-Za-z])|\.\.\."), r"\\ldots "),
    (re.compile(r"\\(?:backslash|setminus|smallsetminus)(?![A-Za-z])"), r"\\setminus "),
    (re.compile(r"\\(?:mid|colon)(?![A-Za-z])"), lambda m: "|" if m[0] == r"\mid" else ":"),
    (re.compile(r"\\(?:varphi)(?![A-Za-z])"), r"\\phi "),
    (re.compile(r"\\(?:varepsilon)(?![A-Za-z])"), r"\\epsilon "),
    (re.compile(r"\\textstyle|\\mathstrut"), ""),
]
_ALIGNED = re.compile(r"\\begin\{(aligned|align\*?|gathered|split)\}(.*?)\\end\{\1\}", re.DOTALL)
_READINGS = [
    (re.compile(r"(?<![0-9])([0-9]{0,9}\.[0-9]{0,20}?)([0-9])\2{2,20}\s*\\ldots"), r"\1\\overline{\2}"),  # 0.333…
    (re.compile(r"(?<=[0-9])\s*[xX]\s*10(?=\s*\^)"), r"\\times 10"),  # 1.5 x 10^3
    (re.compile(r"(?:\{\})?[_^]\{?([0-9a-z]{1,6})\}?\s?C\s?_\{?([0-9a-z]{1,6})\}?"), r"\\binom{\1}{\2}"),  # {}_5C_2
    (re.compile(r"(?<![\w}])([0-9]+|[a-z])\s+choose\s+([0-9]+|[a-z])(?!\w)"), r"\\binom{\1}{\2}"),
]
_STYLED = re.compile(
    r"\\(text|textbf|textit|textrm|textsf|textnormal|mathrm|mathbf|mathit|mathsf|mbox|hbox|operatorname\*?|boldsymbol"
    r"|bm|mathcal|mathbb|emph|underline)\s*\{((?:[^{}]|\{[^{}]*\})*)\}"
)
_GROUPS = r"[1-9][0-9]{0,2}"
# Groups of three digits: by a comma alone, by a comma that LaTeX does not space, by a thin or a plain space.
_THOUSANDS = re.compile(
    rf"(?<![0-9.,}}])(?:{_GROUPS}(?:(?:\s*\{{\s*,\s*\}}\s*|,)(?:\s*\\!\s*)*[0-9]{{3}}(?![0-9]))+"
    rf"|{_GROUPS}(?:(?:\\[,;: ]|~)[0-9]{{3}}(?![0-9]))+|{_GROUPS}(?:[ ][0-9]{{3}}(?![0-9]))+"
    rf"|{_GROUPS}(?:_[0-9]{{3}}(?![0-9]))+)"
    r"(?!,[0-9])"
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
    text, styled = _spelled(text)
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
        found += _tokens_of(kind, match[0], spaced, styled, found)
        depth += (match[0] in ("(", "[", "{", r"\{")) - (match[0] in (")", "]", "}", r"\}"))
        if len(found) > _MAX_TOKENS or depth > _MAX_NESTING:
            raise Ambiguous("too long or too deeply nested")
        spaced = False
    return found


def _tokens_of(kind: str, text: str, spaced: bool, styled: list[Token], before: list[Token]) -> list[Token]:
    if kind == "styled":
        token = styled[int(text[1:-1])]
        return [Token(token.kind, token.text, True)] if token.text else []
    if kind in ("number", "repeating"):
        return [Token(kind, re.sub(r"\s", "", text).rstrip(".") if kind == "number" else text, spaced)]
    if kind == "word":
        return _of_word(text, spaced, before)
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


def _of_word(word: str, spaced: bool, before: list[Token]) -> list[Token]:
    """A run of letters: a function, "and", a word, or a product of symbols such as ``ab``."""
    if word in JOINING:
        return [Token(JOINING[word], word, spaced)]
    if word in PLAIN:
        plain = PLAIN[word]
        return [Token("%", "%", spaced) if plain == r"\%" else Token("command", plain, spaced)]
    last = before[-1] if before else Token("", "")
    number = last.kind in ("number", "repeating") or last.text in ("}", ")", "%")
    if number and is_unit_word(word, spaced):
        return [Token("text", word, spaced)]
    if last.text != "_" and (found := _glued(word)):
        return found
    tight = bool(before) and not spaced and (len(word) == 2 or (number and len(word) <= 6))
    product = last.text in _TAKES_LETTERS or _is_product(word) or tight or set(word) <= set("abcdwxyz")
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


def _spelled(text: str) -> tuple[str, list[Token]]:
    """``text`` in one spelling, and what its style commands held, for the marks that stand for them."""
    if "\x02" in text or "\x03" in text:
        raise Unread("control characters")
    text = text.translate(_FULL_WIDTH)
    text = re.sub(r"[⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿ]+", lambda m: f"^{{{m[0].translate(_SUPERSCRIPTS)}}}", text)
    text = re.sub(r"[₀₁₂₃₄₅₆₇₈₉]+", lambda m: f"_{{{m[0].translate(_SUBSCRIPTS)}}}", text)
    if r"\begin" not in text:  # there, "\\\\" ends a row; elsewhere it is a backslash that was escaped once too often
        text = re.sub(r"\\\\(?=[A-Za-z{}])", r"\\", text)
    text = _SIZES.sub(" ", text.translate(_TABLE))
    for pattern, spelling in _SPELLINGS:
        text = pattern.sub(spelling, text)
    text = _ALIGNED.sub(lambda match: match[2].replace("&", " ").replace(r"\\", ", "), text)
    for pattern, spelling in _READINGS:
        text = pattern.sub(spelling, text)
    styled: list[Token] = []
    text = _STYLED.sub(lambda match: _unstyled(match, styled), text)
    text = _THOUSANDS.sub(_grouped, text)
    text = re.sub(r"\.[0-9]{3}(?:\\,[0-9]{1,3})+(?![0-9])", lambda match: match[0].replace("\\,", ""), text)
    return re.sub(r"\{\s*,\s*\}", ",", text), styled


def _grouped(match: re.Match[str]) -> str:
    """The number, unless its commas may separate entries: bare ones do inside brackets."""
    before = match.string[: match.start()]
    depth = before.count("(") - before.count(")") + before.count("[") - before.count("]")
    depth += before.count(r"\{") - before.count(r"\}")
    alone = re.search(r"[-+*/]\s*\($", before) and match.string[match.end() :].lstrip()[:1] == ")"  # -(1,250)
    if depth > 0 and not alone and re.search(r"[0-9],[0-9]", match[0]):
        return match[0]
    return re.sub(r"[^0-9]", "", match[0])


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
