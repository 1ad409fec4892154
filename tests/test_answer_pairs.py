"""The symbolic verifier on pairs whose verdict is known: written by hand, and made from golds (benchmarks/)."""

from __future__ import annotations

import os
import re
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import verifiers
from ibro_lightning.rewards.mathematics.answers.equality import compare
from ibro_lightning.rewards.mathematics.answers.node import Node, Unread
from ibro_lightning.rewards.mathematics.answers.parser import read
from ibro_lightning.rewards.mathematics.answers.rules import Rules
from ibro_lightning.rewards.mathematics.symbolic import MathVerifyReward, math_verify_score
from verifier_pairs import pairs_of

DATA = Path(os.environ.get("IBRO_DATA", Path(__file__).parents[2] / "shared" / "data"))
LINE = re.compile(r"(?P<gold>.+) (?P<sign>[≡≢]) (?P<answer>.+) ‖ (?P<why>.+)")
HAND_WRITTEN = [
    match
    for line in (Path(__file__).parent / "data" / "answer_pairs.txt").read_text(encoding="utf-8").splitlines()
    if not line.startswith("#") and (match := LINE.fullmatch(line))
]
GOLDS = ["27", "-3", "4096", "105263157894736848", r"\frac{3}{8}", r"-\frac{17}{6}", "5/7", "0.25", "120.5", "1,250"]
GOLDS += ["x^2+5x-6", "(t-7)(t+7)", "12ab^3", "2xy+10x", "(3,-2)", r"\left(\frac{1}{2},4\right)", "[0,5)", "(2,9]"]
GOLDS += [r"(-\infty,-2)\cup(2,\infty)", "2,-5,7", r"\text{Friday}", r"3\sqrt{13}", r"\frac{9}{4}\pi", "6+9i", "52_8"]


def test_the_file_of_pairs_is_read_whole() -> None:
    lines = (Path(__file__).parent / "data" / "answer_pairs.txt").read_text(encoding="utf-8").splitlines()
    assert len(HAND_WRITTEN) == sum(bool(line) and not line.startswith("#") for line in lines) >= 400


@pytest.mark.parametrize("pair", HAND_WRITTEN, ids=lambda pair: f"{pair['gold']} {pair['answer']}"[:50])
def test_a_mathematicians_verdict(pair: re.Match[str]) -> None:
    verdict = MathVerifyReward().judged(rf"\boxed{{{pair['answer']}}}", [pair["gold"]])
    assert verdict.accuracy == float(pair["sign"] == "≡"), f"{verdict.why}, but {pair['why']}"
    assert verdict.why


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
    for gold in verifiers.distinct_golds(files):
        node = read(gold)
        assert compare(node, node, Rules()).same


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


@given(st.text(alphabet=r"0123456789xyzabIie+-*/^_(){}[]|\,;.=<> $%!&~'", max_size=40))
def test_any_text_is_read_or_refused_and_what_is_read_is_itself(text: str) -> None:
    try:
        node = read(text)
    except Unread:
        return
    assert isinstance(node, Node)
    assert compare(node, node, Rules()).same


@given(st.text(alphabet="0123456789x+-*/^(){}!.,", max_size=30), st.sampled_from(GOLDS))
def test_comparing_never_raises(text: str, gold: str) -> None:
    try:
        node = read(text)
    except Unread:
        return
    judgement = compare(read(gold), node, Rules())
    assert judgement.why
