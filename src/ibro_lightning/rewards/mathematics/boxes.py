r"""What is in a ``\boxed{}``, and what belongs to it outside: a sign before it, a unit behind, boxes beside it."""

from __future__ import annotations

import re

from ibro_lightning.rewards.mathematics.gold_text import BOX, closing_brace

_BETWEEN = re.compile(r"(?:[\s,;.$&]|\\[,;:! ()\[\]]|\\q?quad|\\text\s*\{\s*(?:and|or)?\s*\}|\band\b|\bor\b)*")
_SIGN = re.compile(r"(?:^|[=$({\[]|\\\(|\\\[|\s)\s*[-−]\s*$")
_UNIT = re.compile(r"\s*(\\(?:text|mathrm)\s*\{[^{}]*\}|\\?%|\^\s*\{?\s*\\circ\s*\}?)")
_NEAR = 40


def boxed_answer(text: str, before: str, *, alone: bool) -> str:
    """The answer in the boxes of ``text``; ``text`` itself if it has none.

    Args:
        before: what stands before ``text``.
        alone: boxes in running text, of which the last ones count if nothing but "and" or a comma is between them. In
            one formula, all boxes count.
    """
    boxes: list[tuple[int, str, int]] = []
    for opening in BOX.finditer(text):
        if boxes and opening.start() < boxes[-1][2]:
            continue  # a box in a box
        closing = closing_brace(text, opening.end())
        end = len(text) if closing is None else closing
        boxes.append((opening.start(), text[opening.end() : end].strip(), end + 1))
    if not boxes:
        return text
    found = [boxes[-1]]
    for box in reversed(boxes[:-1]):
        between = text[box[2] : found[0][0]]
        if not (_BETWEEN.fullmatch(between) or (not alone and len(between) < _NEAR and "=" not in between)):
            break
        found.insert(0, box)
    start, content, end = found[-1]
    if BOX.search(content):
        content = boxed_answer(content, "", alone=True)
    if len(found) > 1:
        return ", ".join(dict.fromkeys(inside for _, inside, _ in found))
    if _SIGN.search(before[-20:] + text[:start]):
        content = f"-({content})" if re.search(r"[-+,]", content) else f"-{content}"
    unit = _UNIT.match(text, end)
    return content + (unit[1] if unit else "")
