"""A number in a sentence: whether it is the answer, or a part of one."""

from __future__ import annotations

import re

_END = re.compile(r"[\n;!?]|\.(?![0-9m])")
_START = re.compile(r".*(?:\b(?:is|are|equals?|be)\b|[:=\n])", re.DOTALL)
# What makes a number before it, or behind it, a part of something else.
_BEFORE = re.compile(
    r"(?:[<>≤≥±−^*/√(|]|[0-9],\s|[-+]\s|\b(?:not|than|log|ln|sqrt|least|most|about|approximately))\s*$"
)
_BEHIND = re.compile(
    r"\s*(?:[π√^*/×·+−±<>=:(|!]|-\s*[0-9]|\\|[a-fi-kn-rt-z](?![A-Za-z])|pi\b"
    r"|(?:hundred|thousand|million|billion|trillion|dozen|or|and|to)\b)"
)
_FURTHER = re.compile(r"[ ~]{0,2}[A-Za-z]+,? (?:and )?[0-9]")
_LONGEST = 80


def answer_around(match: re.Match[str], number: str) -> str:
    """``number``, which a pattern has found; or the clause around it where that is the answer: "x > 5", "3 or 4",
    "2√3", "2 hours 30 minutes"."""
    text = match.string
    starts = [match.start(name) for name, value in match.groupdict().items() if value]
    start = min(starts, default=match.start())
    further = r"\text" in number and _FURTHER.match(text, match.end())
    before = text[max(0, start - 200) : start]
    begin = _START.match(before)
    before = before[begin.end() :] if begin else before
    if not (further or _BEFORE.search(before) or _BEHIND.match(text, match.end())):
        return number
    ending = _END.search(text, match.end())
    clause = before + text[start : ending.start() if ending else len(text)]
    clause = clause.strip(" *`_\t,$")
    return clause if len(clause) < _LONGEST else f"{number} ?"
