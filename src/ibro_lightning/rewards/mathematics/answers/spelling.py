r"""One spelling of an answer, whether it is LaTeX, plain text or Unicode, before it is cut into tokens.

>>> one_spelling(r"\dfrac12 ≤ x²")
'\\frac12 \\le   x^{2}'
>>> without_digit_groups(r"12,345 and 1\,000"), without_digit_groups("(1,250)")
('12345 and 1000', '(1,250)')
"""

from __future__ import annotations

import re
from collections.abc import Callable

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
ASCII = _FULL_WIDTH | {ord(space): " " for space in "\u3000\u00a0\u202f\u2009"} | {0x2212: "-"}
"""Full-width forms, spaces that are not ASCII, and the true minus sign, as plain text has them."""
_TABLE = str.maketrans(_UNICODE)

_SIZES = re.compile(
    r"\\(?:m?left|m?right|middle)\s*\.|\\(?:m?left|m?right|middle|[bB]igg?[lrm]?|displaystyle|textstyle|scriptstyle|limits"
    r"|nolimits|phantom\{[^{}]*\}|hspace\*?\{[^{}]*\}|vspace\*?\{[^{}]*\}|label\{[^{}]*\}|tag\*?\{[^{}]*\}|strut|null"
    r"|(?:text)?color\{[^{}]*\}|bf|rm|it|sf|tiny|small|large|Large|LARGE|huge|Huge"
    r"|checkmark|blacksquare)(?![A-Za-z])"
)
_COMMANDS: list[tuple[re.Pattern[str], str | Callable[[re.Match[str]], str]]] = [
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
    (re.compile(r"\\mathstrut(?![A-Za-z])"), ""),
]
_ALIGNED = re.compile(r"\\begin\{(aligned|align\*?|gathered|split)\}(.*?)\\end\{\1\}", re.DOTALL)
_SPACE = r"(?:\s|\\[,;:! ])*"
_MOD = r"\\(?:text|mathrm)\{\s*mod\s*\}|\\?b?mod(?![A-Za-z])"
_IDIOMS = [
    (re.compile(r"(?<![0-9])([0-9]{0,9}\.[0-9]{0,20}?)([0-9])\2{2,20}\s*\\ldots"), r"\1\\overline{\2}"),  # 0.333…
    (re.compile(r"(?<=[0-9])\s*[xX]\s*10(?=\s*\^)"), r"\\times 10"),  # 1.5 x 10^3
    (re.compile(r"(?:\{\})?[_^]\{?([0-9a-z]{1,6})\}?\s?C\s?_\{?([0-9a-z]{1,6})\}?"), r"\\binom{\1}{\2}"),  # {}_5C_2
    (re.compile(rf"\({_SPACE}(?:{_MOD}){_SPACE}([0-9]+|[a-z])\s*\)"), r"\\pmod{\1}"),
    (re.compile(r"(?<=[0-9])\s*\\text\s*\{\s*to\s*\}\s*(?=[0-9])"), ":"),  # 3 \text{ to } 4
    (re.compile(r"(?<![\w}])([0-9]+|[a-z])\s+choose\s+([0-9]+|[a-z])(?!\w)"), r"\\binom{\1}{\2}"),
]
_GROUPS = r"[1-9][0-9]{0,2}"
# Groups of three digits: by a comma alone, by a comma that LaTeX does not space, by a thin or a plain space.
_THOUSANDS = re.compile(
    rf"(?<![0-9.,}}])(?:{_GROUPS}(?:(?:\s*\{{\s*,\s*\}}\s*|,)(?:\s*\\!\s*)*[0-9]{{3}}(?![0-9]))+"
    rf"|{_GROUPS}(?:(?:\\[,;: ]|~)[0-9]{{3}}(?![0-9]))+|{_GROUPS}(?:[ ][0-9]{{3}}(?![0-9]))+"
    rf"|{_GROUPS}(?:_[0-9]{{3}}(?![0-9]))+)"
    r"(?!,[0-9])"
)


def one_spelling(text: str) -> str:
    """``text`` with one command or sign for each thing that has several."""
    # Full-width digits and brackets first: later patterns look for plain ones.
    text = text.translate(_FULL_WIDTH)
    # Runs of raised or lowered digits are one exponent or index; one at a time they would be several.
    text = re.sub(r"[⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿ]+", lambda m: f"^{{{m[0].translate(_SUPERSCRIPTS)}}}", text)
    text = re.sub(r"[₀₁₂₃₄₅₆₇₈₉]+", lambda m: f"_{{{m[0].translate(_SUBSCRIPTS)}}}", text)
    if r"\begin" not in text:  # there, "\\\\" ends a row; elsewhere it is a backslash that was escaped once too often
        text = re.sub(r"\\\\(?=[A-Za-z{}])", r"\\", text)
    # Signs become commands before commands are unified; sizes, which stand between a command and its argument, go.
    text = _SIZES.sub(" ", text.translate(_TABLE))
    for pattern, spelling in _COMMANDS:
        text = pattern.sub(spelling, text)
    text = _ALIGNED.sub(lambda match: match[2].replace("&", " ").replace(r"\\", ", "), text)
    for pattern, spelling in _IDIOMS:  # of several tokens, each in its one spelling by now
        text = pattern.sub(spelling, text)
    return text


def without_digit_groups(text: str) -> str:
    """``text`` with numbers in one piece. What style commands hold has to be in it: ``\\text{12,345}`` is a number."""
    text = _THOUSANDS.sub(_in_one_piece, text)
    text = re.sub(r"\.[0-9]{3}(?:\\,[0-9]{1,3})+(?![0-9])", lambda match: match[0].replace("\\,", ""), text)
    return re.sub(r"\{\s*,\s*\}", ",", text)  # after the groups: a comma that is left over separates entries


def _in_one_piece(match: re.Match[str]) -> str:
    """The number, unless its commas may separate entries: bare ones do inside brackets."""
    before = match.string[: match.start()]
    depth = before.count("(") - before.count(")") + before.count("[") - before.count("]")
    depth += before.count(r"\{") - before.count(r"\}")
    alone = re.search(r"[-+*/]\s*\($", before) and match.string[match.end() :].lstrip()[:1] == ")"  # -(1,250)
    if depth > 0 and not alone and re.search(r"[0-9],[0-9]", match[0]):
        return match[0]
    return re.sub(r"[^0-9]", "", match[0])
