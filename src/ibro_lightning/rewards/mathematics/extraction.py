r"""Where in a text the answer is: by the patterns of the library math-verify, from the most to the least explicit.

These are the last box, then "the final answer is …", then what follows the word "answer", then the last formula, then
the last number.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby
from typing import Any

from ibro_lightning.rewards.mathematics.boxes import boxed_answer
from ibro_lightning.rewards.mathematics.expressions import library, targets
from ibro_lightning.rewards.mathematics.gold_text import BOX
from ibro_lightning.rewards.mathematics.sentences import answer_in


@dataclass(frozen=True)
class Extract:
    """An answer as it stands in a text.

    Args:
        text: without delimiters and box.
        kind: "latex", "expr" (a number or arithmetic without LaTeX), or "string" (a letter).
        library: reads it with the library's own parser, at most once: an expression of sympy, or None.
    """

    text: str
    kind: str
    match: re.Match[str]
    target: Any

    def library(self) -> Any:
        return library().parser.extract_match(self.match, self.target)[0]


def extracts(text: str, match_types: tuple[str, ...]) -> Iterator[Extract]:
    """The places in a text at which the answer may be, the likeliest first."""
    patterns = [
        (priority, pattern, target, kind)
        for (found, target), kind in zip(_patterns(match_types), match_types, strict=True)
        for pattern, priority in found
    ]
    for _, group in groupby(sorted(patterns, key=lambda entry: entry[0]), key=lambda entry: entry[0]):
        matches = [(match, target, kind) for _, pattern, target, kind in group for match in pattern.finditer(text)]
        for match, target, kind in sorted(matches, key=lambda entry: (entry[0].end(), -entry[0].start()), reverse=True):
            yield Extract(_text(match, kind), kind, match, target)


def _text(match: re.Match[str], kind: str) -> str:
    groups = match.groupdict()
    if kind == "string":
        return match["string_keys"]
    if kind == "expr":
        start = min(match.start(name) for name, value in groups.items() if value)
        end = max(match.end(name) for name, value in groups.items() if value)
        end = start + len(match.string[start:end].rstrip(" .\n"))
        return answer_in(match.string, start, end, _number(groups))
    parts, start, end = [], len(match.string), 0
    for name, value in groups.items():
        if value and "_latex" in name:
            if BOX.search(value):
                return boxed_answer(match.string)
            percent = groups.get(f"{name.split('_')[0]}_percent")
            parts.append(value + (r"\%" if percent else ""))
            start, end = min(start, match.start(name)), max(end, match.end(name))
    end = max([end, *(match.end(name) for name, value in groups.items() if value and name.endswith("_percent"))])
    return answer_in(match.string, start, end, ", ".join(parts))


def _number(groups: dict[str, Any]) -> str:
    """A number outside formulas, where a comma may be its decimal point."""
    whole = next((value for name, value in groups.items() if name.startswith("integer") and value), "")
    decimals = next((value for name, value in groups.items() if name.startswith("decimal") and value), "")
    if not (whole or decimals):
        return groups.get("expr") or ""
    return re.sub(r"[ ,]", "", whole) + decimals.replace(",", ".") + (r"\%" if groups.get("percent") else "")


@lru_cache(maxsize=16)
def _patterns(match_types: tuple[str, ...]) -> list[tuple[list[tuple[re.Pattern[str], int]], Any]]:
    found: list[tuple[list[tuple[re.Pattern[str], int]], Any]] = library().parser.get_extraction_regexes(
        list(targets(match_types))
    )
    return found
