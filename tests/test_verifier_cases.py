"""Peers' cases, and gold answers in every presentation a model uses, right as they are and wrong once changed.

The small tables here hold cases of the same kinds; the tests on real files need ``IBRO_DATA`` and are skipped without.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest

from ibro_lightning.rewards.mathematics.dapo_reward import dapo_score
from ibro_lightning.rewards.mathematics.gold_text import canonical_gold
from ibro_lightning.rewards.mathematics.symbolic import math_verify_score

DATA = Path(os.environ.get("IBRO_DATA", Path(__file__).parents[2] / "shared" / "data"))
BOTH = {"match_types": ["latex", "expr"]}
LATEX = {"match_types": ["latex"]}
EXPR = {"match_types": ["expr"]}

OWN_CASES: list[tuple[str, str, str, dict[str, Any], bool]] = [  # family, gold, response, options, expected
    ("math-verify", "1200", "we pay 1,200.00€", EXPR, True),
    ("math-verify", "1,5", "1.5", EXPR, True),
    ("math-verify", "7", "XK7B", EXPR, False),
    ("math-verify", "7/3", r"\frac{7}{3}", BOTH, True),
    ("math-verify", "$[2,5)$", "$(2,5)$", BOTH, False),
    ("math-verify", "$15\\%$", "15 percent", BOTH, True),
    ("math-verify", "$15\\%$", r"$\boxed{15 pct}", BOTH, True),
    ("math-verify", "$1/3$", r"$\frac13 \text{meters}$", LATEX, True),
    ("math-verify", "$8$", "Answer \\( \n 8 \n \\)", LATEX, False),
    ("math-verify", "$8$", "Answer $$ \n 8 \n $$", LATEX, True),
    ("math-verify", "$x < 4$", r"We find that $x \lt 4$.", LATEX, True),
    ("math-verify", "$x < 4$", "$x > -4$", LATEX, False),
    ("math-verify", "$n=2$", "$2$", LATEX, True),
    ("math-verify", "$a + 2z = 0$", "$0$", LATEX, False),
    ("math-verify", r"$(\frac{1}{3},2)$", "$(0.33,2)$", {**BOTH, "precision": 2}, True),
    ("math-verify", r"$(\frac{1}{3},2)$", "$(0.33,2)$", {**BOTH, "precision": 6}, False),
    ("math-verify", "$g(x)$", "$g(t)$", {**BOTH, "strict": False}, True),
    ("math-verify", "$g(x)$", "$g(t)$", BOTH, False),
    ("math-verify", r"$-1 \le x \le 4$", r"$x \in [-1,4]$", {**LATEX, "allow_set_relation_comp": False}, True),
    ("math-verify", r"$x \in [-1,4]$", r"$-1 \le x \le 4$", {**LATEX, "allow_set_relation_comp": False}, False),
    ("math-verify", "$2$ and $5$", r"$\boxed{2,5}$", BOTH, True),
    ("math-verify", r"$\pm 8$", "${-8, 8}$", {}, True),
    ("math-verify", "$12$", "Final Answer: The final answer is $12$. I hope it is correct.", BOTH, True),
    ("dapo", "7", r"Answer: \boxed{7}", {}, True),
    ("dapo", r"\frac{2}{3}", r"Answer: \frac23", {}, True),
    ("dapo", r"\frac{1}{4}", r"Answer: \boxed{0.25}", {}, False),
    ("dapo", "7", r"<|im_start|>Answer: \boxed{7}<|im_end|>", {}, True),
    ("dapo", "7", r"Answer: \boxed{7}im_end|>", {}, False),
]
OWN_GOLDS = ["27", "-2", "0", "105263157894736848", "1,2,-3", "10080", r"\frac{14}{3}", "p - q", r"3\sqrt{13}", "6+9i"]
OWN_GOLDS += [r"\left( 3, \frac{\pi}{2} \right)", r"\text{Evelyn}", r"x \in [-2,7]", r"10\%", "52_8", ".0000672", "x=5"]
OWN_GOLDS += [r"\begin{pmatrix} -2 \\ -14 \\ -7 \end{pmatrix}", r"1 \pm \sqrt{19}", r"(2,\infty)", "5x - 7y + 4 = 0"]

FORMS = ["Answer: {}", r"\boxed{{{}}}", "${}$", "**Answer:** {}"]
FORMS += [form + "." for form in FORMS]
FILES = {  # golds, and how many different ones
    "aime24": (30, 29),
    "aime25": (30, 30),
    "amc23": (40, 25),
    "dapo_math_17k_64": (64, 56),
    "gsm8k_test_400": (400, 172),
    "math500_first250": (250, 167),
}


def rows(name: str) -> list[dict[str, Any]]:
    path = DATA / f"{name}.jsonl"
    if not path.exists():
        pytest.skip(f"{path} is not there")
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def changed(gold: str, others: list[str]) -> list[str]:
    """Wrong answers that are close to ``gold``: one more, the other sign, two digits swapped; and another gold."""
    wrong = {next(other for other in others if other != gold)}
    if re.fullmatch(r"-?\d+", gold):
        sign, digits = ("-", gold[1:]) if gold.startswith("-") else ("", gold)
        wrong |= {str(int(gold) + 1), str(-int(gold))}
        wrong |= {sign + digits[:i] + digits[i + 1] + digits[i] + digits[i + 2 :] for i in range(len(digits) - 1)}
    return sorted(wrong - {gold})


MISTAKEN = {r"$1 - \frac{1}{\mathrm{e}}$", "$z = 1 + 1 = 2$"}
"""Golds of peers' cases that accept another number there, and 3 + 3 = 2; the library's own equality reproduces it."""


def agrees(family: str, gold: str, response: str, options: dict[str, Any], expected: bool) -> bool:
    if gold in MISTAKEN:
        assert math_verify_score(response, gold, **options) == 0.0
        options = {**options, "equality": "library"}
    score = math_verify_score if family == "math-verify" else dapo_score
    return score(response, gold, **options) == float(expected)


@pytest.mark.parametrize("case", OWN_CASES, ids=lambda case: f"{case[1]} {case[2]}"[:40])
def test_cases_of_the_kinds_that_peers_have(case: tuple[str, str, str, dict[str, Any], bool]) -> None:
    assert agrees(*case)


@pytest.mark.parametrize(("family", "count"), [("math-verify", 130), ("dapo", 10)])
def test_every_case_of_peers_is_decided_as_they_do(family: str, count: int) -> None:
    cases = [row for row in rows("verifier_cases") if row["family"] == family]
    assert len(cases) == count
    wrong = [
        (row["gold"], row["pred"], row["expected"])
        for row in cases
        if not agrees(family, row["gold"], row["pred"], row["options"], row["expected"])
    ]
    assert wrong == []


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("gold", OWN_GOLDS)
def test_a_gold_answer_is_right_in_every_form_and_wrong_once_changed(gold: str, form: str) -> None:
    assert math_verify_score(form.format(gold), gold) == 1.0
    assert dapo_score(form.format(gold), gold, strict=False) == 1.0
    assert dapo_score(form.format(gold), gold) == float(form == FORMS[0] or ("=" in gold and form == FORMS[3]))
    for wrong in changed(gold, OWN_GOLDS):
        assert math_verify_score(form.format(wrong), gold) == 0.0
        assert dapo_score(form.format(wrong), gold, strict=False) == 0.0
        assert dapo_score(form.format(wrong), gold) == 0.0


@pytest.mark.parametrize("name", FILES)
def test_gold_answers_of_real_files_verify_themselves_and_nothing_close(name: str) -> None:
    golds = [canonical_gold(row["answer"]) for row in rows(name)]
    unique = list(dict.fromkeys(golds))
    assert (len(golds), len(unique)) == FILES[name]
    rejected = [
        (score.__name__, gold, form)
        for gold in unique
        for form in FORMS
        for score in (math_verify_score, lenient)
        if score(form.format(gold), gold) != 1.0
    ]
    accepted = [
        (score.__name__, gold, form, wrong)
        for place, gold in enumerate(unique)
        for wrong in changed(gold, unique[place + 1 :] + unique[:place])
        for form in FORMS
        for score in (math_verify_score, lenient, dapo_score)
        if score(form.format(wrong), gold) != 0.0
    ]
    assert (rejected, accepted) == ([], [])
    assert [gold for gold in unique if dapo_score(f"Answer: {gold}", gold) != 1.0] == []


def lenient(response: str, gold: str) -> float:
    return dapo_score(response, gold, strict=False)
