"""The text in which a response's answer is looked for: its end or its "Answer:" line, with formulas as TeX has them."""

from __future__ import annotations

import re

from ibro_lightning.rewards.mathematics.answer_text import answer_line, bare, without_special_tokens
from ibro_lightning.rewards.mathematics.gold_text import BOX

_MAX_NESTING = 50
_BRACKET = re.compile(r"[(\[{}\])]")
BOXED = re.compile(r"\\(?:boxed|fbox)")
_BOXED_DIGIT = re.compile(r"\\(?:boxed|fbox)\s*([0-9A-Za-z])(?![0-9A-Za-z{])")
DELIMITED = re.compile(r"(?<!\\)(?:\$|\\\(|\\\[)|\\boxed|\\fbox")
COMMAND = re.compile(r"\\(?:text|textbf|mathrm|mbox|operatorname|begin|end)\s*\{[^{}]*\}|\\[A-Za-z]+")
_FUNCTION = "sin|cos|tan|cot|sec|csc|arcsin|arccos|arctan|sinh|cosh|tanh|log|exp|sqrt|mod|gcd|lcm|max|min|and|det|inf"
_WORD = re.compile(rf"\b(?!(?:{_FUNCTION})\b)(?:[A-Za-z]{{3,}}|is|of|to|by|be|as|on|it|if|an|no|at)\b")
_TAGGED = re.compile(r"<answer>((?:[^<]|<(?!/?answer>))*)</answer>\s*(?:</[a-z]+>\s*)*$")
_MARKUP = [
    (re.compile("−"), "-"),
    (re.compile(r"<sup>\s*([^<>]{1,40})\s*</sup>"), r"^{\1}"),
    (re.compile(r"<sub>\s*([^<>]{1,40})\s*</sub>"), r"_{\1}"),
    (re.compile(r"=/=|(?<![=<>!0-9)}])!=(?!=)"), "≠"),  # but 5!=120
    (re.compile(r"(?<![<>=])>=(?!=)"), "≥"),
    (re.compile(r"(?<![<>=])<=(?![=>])"), "≤"),
    (re.compile(r"~~[^~\n]{1,400}~~"), " "),  # struck out
]


def searched_text(response: str, match_types: tuple[str, ...], last_chars: int) -> str:
    """Where the answer is looked for: the end of the response, or the "Answer:" line in dollars if it is a formula."""
    text = _in_tex(_tagged(without_special_tokens(response[-last_chars:])))
    text = BOX.sub(r"\\boxed{", _BOXED_DIGIT.sub(r"\\boxed{\1}", text))
    if len(response) > last_chars and 0 <= (line_end := text.find("\n")) < len(text) - 1:
        text = text[line_end + 1 :]  # a cut within a formula would swap formulas and text in all that follows
    if _depth(text) > _MAX_NESTING:
        return ""
    line = answer_line(text) if "latex" in match_types else None
    value = "" if line is None or BOXED.search(line) else bare(line)
    return f"${' '.join(value.split())}$" if value and _is_formula(value) else text


def _tagged(text: str) -> str:
    """What ``<answer>…</answer>`` at the end of a response holds, as if in a box if it is a formula."""
    if (tagged := _TAGGED.search(text)) is None:
        return text
    content = tagged[1].strip()
    return rf"\boxed{{{content}}}" if not BOXED.search(content) and _is_formula(bare(content)) else content


def _in_tex(text: str) -> str:
    """``text`` with powers, indices and relations as formulas have them, and without what is struck out."""
    for pattern, written in _MARKUP:
        text = pattern.sub(written, text)
    return text


def _is_formula(value: str) -> bool:
    """Whether a value without delimiters is mathematics, or a single word, rather than a sentence."""
    plain = COMMAND.sub(" ", value)
    return not DELIMITED.search(value) and (not _WORD.search(plain) or plain.strip(" {}").isalpha())


def _depth(text: str) -> int:
    """The deepest nesting of brackets, in which the library's parser takes quadratic time."""
    depth = deepest = 0
    for bracket in _BRACKET.findall(text):
        depth = depth + 1 if bracket in "([{" else max(depth - 1, 0)
        deepest = max(deepest, depth)
    return deepest
