r"""What is in a ``\boxed{}``, with what belongs to it outside: signs, factors, a unit, other boxes, words.

>>> [boxed_answer(text) for text in (r"$x = \boxed{5}$ cm", r"$2\boxed{\pi}$", r"$\boxed{5}^2$", r"\boxed{1}\boxed{2}")]
['5\\text{ cm}', '2(\\pi)', '(5)^2', '1, 2']
>>> [boxed_answer(text) for text in (r"$-\boxed{5}$", r"$x \ne \boxed{5}$", r"\boxed{5} million", r"not \boxed{5}")]
['-5', 'x \\ne (5)', '5 million', 'not 5']
"""

from __future__ import annotations

import re

from ibro_lightning.rewards.mathematics.gold_text import BOX, closing_brace
from ibro_lightning.rewards.mathematics.sentences import answer_in, since

_SPACE = r"(?:\s|\\[,;:! ]|~|\\q?quad(?![A-Za-z])|\\(?:left|right|displaystyle)(?![A-Za-z]))*"
_BETWEEN = re.compile(
    r"(?:[\s,;.$&]|\\[,;:! ()\[\]]|\\q?quad|\\text\s*\{\s*,?\s*(?:and|or)?\s*\}|\band\b|\bor\b|[-+*~]{3,}|\\$)*"
)
_LISTED = re.compile(r"[,;]|and|or")
_TEXT = r"\\(?:text|mathrm|textrm|textbf|mbox|textnormal)\s*\{[^{}]*\}"
_ARROWS = r"\\(?:implies|iff|to|therefore|because|in|approx|(?:[lL]ong)?(?:[lL]eft)?[rR]ightarrow)(?![A-Za-z])"
_WORDS = r"(?<![A-Za-z\\])[A-Za-z]{2,}"
# A box is a term of its own behind these, and before those; any other neighbour makes it a part of a formula.
_BEGINS = re.compile(
    rf"(?:^|\n|</?[A-Za-z_]+>|(?<![<>!])(?<!\\not)=|[$:,;.?&`#\"“]|\\[()\[\]]|\\\\|\\n|(?<![0-9A-Za-z)}}\]])\*{{1,3}}|(?<=[A-Za-z]{{2}})\*\*|(?<!\w)__?"
    rf"|\\begin\s*\{{[a-z*]+\}}|\\(?:text[a-z]*|underline|mathbf|bm|boldsymbol)\s*\{{|{_ARROWS}|{_TEXT}|{_WORDS}){_SPACE}\\?$"
)
"""A single backslash may end it: that of a text whose backslashes were escaped once too often."""
_ENDS = re.compile(
    rf"{_SPACE}(?:$|\n|</?[A-Za-z_]+>|[✅✓✔🎉]|[$=:;?&*_`\"”}}—]|[.,](?![0-9])|\\[()\[\]]|\\\\|\\(?:end|tag|qed|blacksquare|square|checkmark)(?![a-z])"
    rf"|{_ARROWS})|[ \t]+(?:[A-Za-z]{{2,}}|[aI]\s|\([A-Za-z]{{2,}})"
)
_STRUCTURE = re.compile(rf"{_SPACE}(?:[=&]|\\\\|\\(?:end|tag|qed|blacksquare|square|checkmark)(?![a-z])|{_ARROWS})")
_SIGN = re.compile(rf"(?:[-+−]|\\[pm][pm](?![A-Za-z])){_SPACE}$")
_BULLET = re.compile(r"(?:^|\n)\s*[-+*•]\s+$")
_UNIT = re.compile(rf"{_SPACE}({_TEXT}(?:\^\{{?[23]\}}?)?|\\?%|\^\s*\{{?\s*\\circ\s*\}}?|°)")
_REMARK = re.compile(
    rf"({_SPACE})\\[a-z]+\s*\{{(\s*(?:is|are|because|since|so|which|where|for|when|as|in)\b[^{{}}]*)\}}"
)
"""Text behind a box that is no unit, but goes on with the sentence."""
# Where the formula begins and ends that a box is a part of.
_START = re.compile(rf"\n|\$|\\[(\[]|\\\\|&|(?<![<>!])=|[:;]|, |\\begin\s*\{{[a-z*]+\}}|{_WORDS}\s|{_ARROWS}|{_TEXT}")
_END = re.compile(rf"\n|(?<!\\)\$|\\[)\]]|\\\\|&|[=;]|,\s|\.(?![0-9])|\\end|{_ARROWS}")
_DISPLAY = re.compile(r"\$\$|\\\[|\\\]")
_NEAR = 200


def boxed_answer(text: str) -> str:
    """The answer in the last boxes of ``text``, which has one: the content of one that stands alone, all of them, with
    commas, where nothing but "and" or a comma is between; otherwise the formula or the clause that they are a part of.
    """
    boxes: list[tuple[int, str, int]] = []
    for opening in BOX.finditer(text):
        if boxes and opening.start() < boxes[-1][2]:
            continue  # a box in a box
        closing = closing_brace(text, opening.end())
        end = len(text) if closing is None else closing
        boxes.append((opening.start(), text[opening.end() : end].strip(), end + 1))
    found, listed = [boxes[-1]], False
    for box in reversed(boxes[:-1]):
        between = text[box[2] : found[0][0]]
        if not _BETWEEN.fullmatch(between):
            break
        found.insert(0, box)
        listed = listed or _LISTED.search(between) is not None
    contents = [boxed_answer(content) if BOX.search(content) else content for _, content, _ in found]
    if not listed and len(set(contents)) == 1:  # the same answer, twice
        contents = contents[:1]
    return _with_surroundings(text, found[0][0], found[-1][2], ", ".join(contents))


def _with_surroundings(text: str, start: int, end: int, content: str) -> str:
    before, after = text[max(0, start - _NEAR) : start], text[end : end + _NEAR]
    delimiters = _DISPLAY.findall(text[:start])
    if delimiters and (delimiters[-1] == r"\[" or delimiters.count("$$") % 2):  # line breaks count for nothing there
        before, after = before.replace("\n", " "), after.replace("\n", " ")
    if re.match(r"[.,]?[0-9]", after) or (re.search(r"[0-9][.,]?$", before) and content[:1].isdigit()):
        return f"{content} ?"
    after = _REMARK.sub(r"\1 \2 ", after, count=1) if _REMARK.match(after) else after
    sign = None if _BULLET.search(before) else _SIGN.search(before)
    lead = before[: sign.start()] if sign else before
    unit = _UNIT.match(after)
    behind = after[unit.end() :] if unit else after
    if not (_BULLET.search(before) or _BEGINS.search(lead)) or not _ENDS.match(behind):
        left, right = since(_START, before), _until(_END, after)
        return f"{left}({content}){right}".strip() if (left + right).strip() else f"{content} ?"
    behind = "" if _STRUCTURE.match(behind) else behind
    answer = content
    if sign:
        answer = sign[0].strip() + (f"({content})" if re.search(r"[-+,]", content) else f" {content}".lstrip())
    return answer_in(lead + behind, len(lead), len(lead), answer + (f" {unit[1]}" if unit else ""), boxed=True)


def _until(pattern: re.Pattern[str], text: str) -> str:
    found = pattern.search(text)
    return text[: found.start()] if found else text
