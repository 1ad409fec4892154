"""The published rule of DAPO: which answer it reads, and how it spells it. Nothing here is lenient.

The rule is ``compute_score`` of ``verl/utils/reward_score/math_dapo.py`` (verl, Apache-2.0), whose normalisation goes
back to Lewkowycz et al. 2022, appendix D. The tables are data of the rule; the code is ours, and compared with the
published one in the tests.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial

_TAIL = 300
_ANSWER = re.compile(r"(?i)Answer\s*:\s*([^\n]+)")

# In the rule's order, each of its oddities kept: "a " also goes from "alpha 3", and "\text{m}" turns into "\text{}",
# which the second table then removes.
_REPLACED = (
    ("an ", ""),
    ("a ", ""),
    (".$", "$"),
    ("\\$", ""),
    ("\\ ", ""),
    (" ", ""),
    ("mbox", "text"),
    (",\\text{and}", ","),
    ("\\text{and}", ","),
    ("\\text{m}", "\\text{}"),
)
_REMOVED = (
    *("square", "ways", "integers", "dollars", "mph", "inches", "hours", "km", "units", "\\ldots", "sue", "points"),
    *("feet", "minutes", "digits", "cents", "degrees", "cm", "gm", "pounds", "meters", "meals", "edges", "students"),
    *("childrentickets", "multiples", "\\text{s}", "\\text{.}", "\\text{\ns}", "\\text{}^2", "\\text{}^3"),
    *("\\text{\n}", "\\text{}", "\\mathrm{th}", "^\\circ", "^{\\circ}", "\\;", ",\\!", "{,}", '"', "\\dots"),
)


def published_answer(response: str) -> str | None:
    """What follows the last "Answer:" within the last 300 characters, up to the end of the line; None without one."""
    found = _ANSWER.findall(response[-_TAIL:])
    return found[-1] if found else None


def normalized(answer: str) -> str:
    """An answer as the published rule spells it. Takes time in proportion to its length, whatever it says."""
    answer = tidied(answer.split("=")[-1])
    if answer.replace(",", "").isdigit():
        answer = answer.replace(",", "")
    return answer.strip()


def tidied(answer: str) -> str:
    """The rule's tables and its rewriting of LaTeX, without what it does about ``=`` and about commas in numbers."""
    for old, new in _REPLACED:
        answer = answer.replace(old, new)
    for expression in _REMOVED:
        answer = answer.replace(expression, "")
    # The rule says these five in regular expressions, in which a dot ends at a line break, and which take quadratic
    # time on a hostile gold. Cut by hand, line by line, they take linear time and give the same.
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
    """The first ``\\boxed{`` and the line's last closing brace go, if it comes after."""
    before, opening, after = line.partition("\\boxed{")
    inside, closing, following = after.rpartition("}")
    return before + inside + following if opening and closing else line
