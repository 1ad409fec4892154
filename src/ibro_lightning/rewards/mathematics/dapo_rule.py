"""The published rule of DAPO, to the letter: which answer it reads, and how it spells it.

The rule is ``compute_score`` of ``verl/utils/reward_score/math_dapo.py`` (verl, Apache-2.0), whose normalisation goes
back to Lewkowycz et al. 2022, appendix D. The tables are the rule's; the code is ours, and the tests compare it with
the published one.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial

_TAIL = 300
_ANSWER = re.compile(r"(?i)Answer\s*:\s*([^\n]+)")

# In the rule's order, with all its oddities: "a " also goes from "alpha 3", and "\text{m}" turns into "\text{}",
# which the second table then removes.
_REPLACED = (
    *(("an ", ""), ("a ", ""), (".$", "$"), ("\\$", ""), ("\\ ", ""), (" ", ""), ("mbox", "text")),
    *((",\\text{and}", ","), ("\\text{and}", ","), ("\\text{m}", "\\text{}")),
)
_REMOVED = (
    *("square", "ways", "integers", "dollars", "mph", "inches", "hours", "km", "units", "\\ldots", "sue", "points"),
    *("feet", "minutes", "digits", "cents", "degrees", "cm", "gm", "pounds", "meters", "meals", "edges", "students"),
    *("childrentickets", "multiples", "\\text{s}", "\\text{.}", "\\text{\ns}", "\\text{}^2", "\\text{}^3"),
    *("\\text{\n}", "\\text{}", "\\mathrm{th}", "^\\circ", "^{\\circ}", "\\;", ",\\!", "{,}", '"', "\\dots"),
)


def published_answer(response: str) -> str | None:
    """The rest of the line after the last "Answer:" in the last 300 characters; None without one."""
    found = _ANSWER.findall(response[-_TAIL:])
    return found[-1] if found else None


def normalized(answer: str) -> str:
    """An answer as the published rule spells it, in linear time for any text."""
    answer = tidied(answer.split("=")[-1])
    if answer.replace(",", "").isdigit():
        answer = answer.replace(",", "")
    return answer.strip()


def tidied(answer: str) -> str:
    """Apply the rule's tables and its rewriting of LaTeX, but not its treatment of ``=`` and of commas in numbers."""
    for old, new in _REPLACED:
        answer = answer.replace(old, new)
    for expression in _REMOVED:
        answer = answer.replace(expression, "")
    # The rule has regular expressions for these five, in which a dot does not match a line break, and which take
    # quadratic time on a hostile gold. Splitting line by line gives the same in linear time.
    answer = _by_line(answer, _formula_only)
    for command in ("\\text{", "\\textbf{", "\\overline{"):
        answer = _by_line(answer, partial(_without_command, command=command))
    answer = _by_line(answer, _without_box)
    answer = re.sub(r"(frac)([^{])(.)", r"frac{\2}{\3}", answer)
    answer = re.sub(r"(sqrt)([^{])", r"sqrt{\2}", answer)
    return answer.replace("$", "")


def _by_line(text: str, change: Callable[[str], str]) -> str:
    return "\n".join(change(line) for line in text.split("\n"))


def _formula_only(line: str) -> str:
    """The first ``$...$`` of the line; the whole line if it has none."""
    parts = line.split("$", 2)
    return f"${parts[1]}$" if len(parts) == 3 else line


def _without_command(line: str, command: str) -> str:
    """``\\text{abc}`` → ``abc`` for every occurrence, each up to the first closing brace, nested or not."""
    done, rest = "", line
    while True:
        before, opening, after = rest.partition(command)
        inside, closing, following = after.partition("}")
        if not opening or not closing:
            return done + rest
        done, rest = done + before + inside, following


def _without_box(line: str) -> str:
    """Remove the first ``\\boxed{`` and the line's last closing brace, if it comes after."""
    before, opening, after = line.partition("\\boxed{")
    inside, closing, following = after.rpartition("}")
    return before + inside + following if opening and closing else line
