"""The symbolic verifier on pairs whose verdict is known: written by hand, and made from golds (benchmarks/)."""

from __future__ import annotations

import os
import re
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import verifiers
from ibro_lightning.rewards.mathematics.answers.equality import compare
from ibro_lightning.rewards.mathematics.answers.grammar import read
from ibro_lightning.rewards.mathematics.answers.node import Unread
from ibro_lightning.rewards.mathematics.answers.rules import Rules
from ibro_lightning.rewards.mathematics.symbolic import MathVerifyReward, math_verify_score
from ibro_lightning.types import Prompt
from verifier_pairs import pairs_of

DATA = Path(os.environ.get("IBRO_DATA", Path(__file__).parents[2] / "shared" / "data"))
LINE = re.compile(r"(?P<gold>.+) (?P<sign>[≡≢]) (?P<answer>.+) ‖ (?P<why>.+)")
FOLDER = Path(__file__).parent / "data"


def hand_written(name: str) -> list[re.Match[str]]:
    lines = (FOLDER / name).read_text(encoding="utf-8").splitlines()
    return [match for line in lines if not line.startswith("#") and (match := LINE.fullmatch(line))]


PAIRS, RESPONSES = hand_written("answer_pairs.txt"), hand_written("answer_responses.txt")
GOLDS = ["27", "-3", "4096", "105263157894736848", r"\frac{3}{8}", r"-\frac{17}{6}", "5/7", "0.25", "120.5", "1,250"]
GOLDS += ["x^2+5x-6", "(t-7)(t+7)", "12ab^3", "2xy+10x", "(3,-2)", r"\left(\frac{1}{2},4\right)", "[0,5)", "(2,9]"]
GOLDS += [r"(-\infty,-2)\cup(2,\infty)", "2,-5,7", r"\text{Friday}", r"3\sqrt{13}", r"\frac{9}{4}\pi", "6+9i", "52_8"]


@pytest.mark.parametrize(("name", "found", "least"), [("pairs", PAIRS, 1500), ("responses", RESPONSES, 150)])
def test_the_files_of_pairs_are_read_whole(name: str, found: list[re.Match[str]], least: int) -> None:
    lines = (FOLDER / f"answer_{name}.txt").read_text(encoding="utf-8").splitlines()
    assert len(found) == sum(bool(line) and not line.startswith("#") for line in lines) >= least


def wrong(pairs: list[re.Match[str]], form: str) -> list[str]:
    reward, found = MathVerifyReward(), []
    for pair in pairs:
        verdict = reward.judged(form.format(pair["answer"]), [pair["gold"]])
        assert verdict.why
        if verdict.accuracy != float(pair["sign"] == "≡"):
            found.append(f"{pair[0]}: {verdict.why}")
    return found


def test_a_mathematicians_verdicts_on_answers() -> None:
    assert wrong(PAIRS, r"\boxed{{{}}}") == []


def test_a_mathematicians_verdicts_on_responses() -> None:
    assert wrong(RESPONSES, "{}") == []


HARD = [
    *(r"\max\{\}", r"\log\{\}", r"\floor\{\}", "1e" + "9" * 4500, r"0.\overline{" + "3" * 4600 + "}"),
    *(r"1.234567\times10^{4500}", r"0.1234567\times10^{-4999}", r"\sin(10^{1000000})", r"\cos(2^{999999})"),
    *(r"\sin(\Gamma(100000.5))", r"\gcd(10^{4000000},3^{4000000})", r"\tan(x^{1000000})", "9^{9^{9^{9}}}"),
    r"\{" + ",".join(rf"\sqrt{{{n}}}" for n in range(100, 0, -1)) + r"\}",
]


@pytest.mark.parametrize("answer", HARD, ids=lambda answer: answer[:30])
def test_no_number_raises_or_is_computed_for_long(answer: str) -> None:
    started = time.process_time()
    for gold in ("5", "x", r"\{" + ",".join(rf"\sqrt{{{n}}}" for n in range(1, 101)) + r"\}"):
        math_verify_score(rf"\boxed{{{answer}}}", gold)
    assert time.process_time() - started < 5  # some of these took a minute


def test_other_writings_of_golds_are_right_and_near_misses_wrong() -> None:
    found = [pair for gold in GOLDS for pair in pairs_of(gold)]
    verifiers.check_labels(found)
    wrong = [
        (pair.kind, pair.gold.text, pair.answer)
        for pair in found
        if (math_verify_score(rf"\boxed{{{pair.answer}}}", pair.gold.text) == 1.0) != pair.same
    ]
    assert wrong == []
    kinds = Counter((pair.same, pair.kind) for pair in found)
    assert sum(same for same, _ in kinds) >= 25
    assert sum(not same for same, _ in kinds) >= 30


@pytest.mark.skipif(not DATA.exists(), reason="needs IBRO_DATA")
def test_the_same_for_real_golds_of_every_kind() -> None:
    files = [path for path in sorted(DATA.glob("*.jsonl")) if path.name != "verifier_cases.jsonl"]
    golds = verifiers.distinct_golds(files)
    assert len(golds) > 1300
    found = verifiers.pairs(golds, per_kind=25)
    wrong, _, mistaken = verifiers.measured(verifiers.ours(), found)
    assert wrong == {}, mistaken


@pytest.mark.skipif(not DATA.exists(), reason="needs IBRO_DATA")
def test_every_real_gold_is_read_and_is_itself() -> None:
    files = [path for path in sorted(DATA.glob("*.jsonl")) if path.name != "verifier_cases.jsonl"]
    reward = MathVerifyReward()
    for gold in verifiers.distinct_golds(files):
        assert read(gold)
        answers = reward.plain_responses(Prompt("gold", "", (), gold))
        assert [reward.judged(answer, [gold]).accuracy for answer in answers.right] == [1.0], gold
        assert not any(reward.judged(answer, [gold]).accuracy for answer in answers.wrong), gold


NUMBERS = st.fractions(min_value=-1000, max_value=1000, max_denominator=200)


def latex(value: object) -> str:
    from fractions import Fraction

    assert isinstance(value, Fraction)
    sign = "-" if value < 0 else ""
    return f"{sign}\\frac{{{abs(value.numerator)}}}{{{value.denominator}}}"


@given(NUMBERS, NUMBERS)
def test_numbers_are_the_same_if_and_only_if_their_values_are(first: object, second: object) -> None:
    assert compare(read(latex(first)), read(latex(second)), Rules()).same == (first == second)
    added = read(f"{latex(first)}+({latex(second)})")
    assert compare(read(latex(first + second)), added, Rules()).same  # type: ignore[operator]


@given(st.lists(NUMBERS, min_size=2, max_size=4), st.randoms())
def test_lists_have_no_order_and_points_have_one(values: list[object], generator: object) -> None:
    shuffled = list(values)
    generator.shuffle(shuffled)  # type: ignore[attr-defined]
    texts = [", ".join(map(latex, order)) for order in (values, shuffled)]
    assert compare(read(texts[0]), read(texts[1]), Rules()).same
    points = [read(f"({text})") for text in texts]
    assert compare(points[0], points[1], Rules()).same == (values == shuffled)


DIFFERENT = [
    "5",
    "7",
    "x^2",
    "x^3+C",
    r"\sin x+C",
    r"\{1,2\}",
    "(0,1)",
    "(3,1)",
    "[3,4]",
    "x<3",
    "x>4",
    r"x\ne 2",
    "1:2",
    "3:5",
]
# What readers of this verifier have tried in order to be paid for many golds at once.
FOR_ALL = [
    "x>9^{9^9}",
    "x<x",
    r"x\in\emptyset",
    "1<x<0",
    "10^{200}-10^{200}",
    "10^{200}-10^{200}+C",
    r"\ln1:\ln1",
    "|2x-3|>0",
]


def same_as(text: str) -> list[str]:
    return [gold for gold in DIFFERENT if compare(read(gold), read(text), Rules()).same]


@pytest.mark.parametrize("text", FOR_ALL)
def test_no_answer_is_right_for_golds_that_it_does_not_know(text: str) -> None:
    assert same_as(text) == []


@given(st.text(alphabet=r"0123456789xyzabIie+-*/^_(){}[]|\,;.=<> $%!&~'", max_size=40))
def test_no_text_is_the_same_as_two_different_golds(text: str) -> None:
    with suppress(Unread):
        assert len(same_as(text)) <= 1


@given(st.text(alphabet="0123456789x+-*/^(){}!.,", max_size=30), st.sampled_from(GOLDS))
def test_comparing_never_raises(text: str, gold: str) -> None:
    try:
        node = read(text)
    except Unread:
        return
    judgement = compare(read(gold), node, Rules())
    assert judgement.why
