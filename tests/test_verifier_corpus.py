"""The corpus by which verifiers are measured (benchmarks/verifier_pairs): that its labels are right, that the documents
state what it is, and that the symbolic verifier errs on none of it but what is listed as open."""

from __future__ import annotations

import re
from collections import Counter
from fractions import Fraction
from pathlib import Path

import pytest

import verifiers
from verifier_pairs import Pair, own_pairs
from verifier_pairs.checks import agree, check, value, witness
from verifier_pairs.condition_forms import Between, Circle, Congruence, Inequality, Line
from verifier_pairs.forms import Matrix, Money, Quantity, Temperature
from verifier_pairs.formula_forms import Bounded, Power, Product
from verifier_pairs.golds import Gold
from verifier_pairs.near_misses import NEAR_MISSES
from verifier_pairs.own_golds import KINDS_OF_OWN, OWN
from verifier_pairs.own_kinds import Own, decimal
from verifier_pairs.writings import WRITINGS

ROOT = Path(__file__).parent.parent
PAIRS = list(own_pairs())
OPEN = Path(__file__).parent / "data" / "corpus_open.txt"


def test_every_label_that_can_be_computed_is_right() -> None:
    assert verifiers.check_labels(PAIRS) > 1700


def test_every_near_miss_but_of_words_and_sentences_is_another_by_computation() -> None:
    words = ("word: ", "sentence: ", "any form: ")
    unchecked = {pair.kind for pair in PAIRS if not pair.same and not check(pair)}
    assert [kind for kind in unchecked if not kind.startswith(words)] == []


def test_a_wrong_label_ends_the_run() -> None:
    points = ({"x": 4}, {"x": 5})
    weak = Pair(Gold("x < 5", "inequality"), r"x \le 5", True, "", meant=("x < 5", "x <= 5", points))
    with pytest.raises(AssertionError, match="label is wrong"):
        check(weak)
    spelled = Pair(Gold("x < 5", "inequality"), "5 > x", False, "", meant=("x < 5", "x < 5", points))
    with pytest.raises(AssertionError, match="label is wrong"):
        check(spelled)
    with pytest.raises(AssertionError, match="label is wrong"):
        check(Pair(Gold("3", "integer", Fraction(3)), r"\sqrt{8}", True, "", closed="sqrt(8)"))
    assert not check(Pair(Gold("Alice", "word"), "Bob", False, ""))


def of(gold: Own, kind: str) -> Pair:
    return next(pair for pair in own_pairs([gold]) if pair.kind.endswith(f": {kind}"))


@pytest.mark.parametrize(
    ("gold", "kind", "answer", "point"),
    [
        (Inequality("<", Fraction(5)), "strict against weak", r"x \le 5", {"x": 5}),
        (Inequality(">", Fraction(10**9)), "bound negated", "x > -1000000000", {"x": 0}),
        (Between(Fraction(1), "<", "<=", Fraction(4)), "other second sign", "1 < x < 4", {"x": 4}),
        (Congruence(3, 7), "modulus doubled", r"x \equiv 3 \pmod{14}", {"x": -4}),
        (Line(2, 3, 7), "line shifted", "2x + 3y = 8", {"x": -3, "y": Fraction(13, 3)}),
        (Circle(0, 0, 5), "radius not squared", "x^2 + y^2 = 5", {"x": 5, "y": 0}),
        (Bounded("max", 5000), "one argument alone", "n", {"n": 0}),
        (Bounded("gcd", 360), "constant doubled", r"\gcd(n, 720)", {"n": 0}),
        (Power("(-1)", ("m", "+n")), "minus the power", "-(-1)^{m+n}", {"m": 2, "n": 1, "k": 3, "q": 7}),
    ],
)
def test_a_near_miss_differs_at_its_witness(gold: Own, kind: str, answer: str, point: dict[str, object]) -> None:
    pair = of(gold, kind)
    assert (pair.answer, pair.same, witness(pair)) == (answer, False, point)


@pytest.mark.parametrize(
    ("gold", "kind", "answer"),
    [
        (Quantity(Fraction(72), "km/h"), "in another unit", r"20 \text{ m/s}"),
        (Quantity(Fraction(24), "cm^2"), "unit as a word", r"24 \text{ square centimeters}"),
        (Temperature(Fraction(25)), "in fahrenheit", r"77^\circ\text{F}"),
        (Money(540), "in cents", r"540 \text{ cents}"),
        (Inequality("<", Fraction(5000)), "both sides times minus two", "-2x > -10000"),
        (Line(1, -4, 9), "line solved for y", r"y = \frac{1}{4}x - \frac{9}{4}"),
        (Circle(1, -2, 3), "circle multiplied out", "x^2 + y^2 -2x +4y -4 = 0"),
        (Product(Fraction(1), (("N", 1), ("k", 1), ("T", 1))), "letters in reverse", "TkN"),
        (Matrix(((1, 2), (3, 4))), "transposed twice", r"\begin{pmatrix} 1 & 3 \\ 2 & 4 \end{pmatrix}^T"),
    ],
)
def test_other_writings_worked_out_by_hand(gold: Own, kind: str, answer: str) -> None:
    assert (of(gold, kind).answer, of(gold, kind).same) == (answer, True)


def test_meanings_are_exact() -> None:
    assert value("(x + rational(1, 3), n // 7)", {"x": Fraction(2, 3), "n": 50}) == (1, 7)
    assert value("int('52', 8) + slope(lambda x: x**3, y)", {"y": 2}) == 54
    assert agree(value("unit**2", {}), value("-1", {}))
    assert not agree(True, 1)
    assert not agree((1, "length"), (1, "time"))
    for first, second in ((0.5, 0.5), (value("1.5 * x", {"x": 1}), value("x", {"x": 1}))):
        with pytest.raises(TypeError, match="no exact number"):
            agree(first, second)
    assert (decimal(Fraction(-1, 8)), decimal(Fraction(1, 3)), decimal(1000)) == ("-0.125", None, "1000")


def test_every_kind_has_pairs_and_no_pair_comes_twice() -> None:
    assert {(pair.same, pair.kind) for pair in PAIRS} == KINDS_OF_OWN
    assert Counter((pair.gold.text, pair.response) for pair in PAIRS).most_common(1)[0][1] == 1
    assert [pair for pair in PAIRS if pair.answer == pair.gold.text] == []
    assert len({gold.text for gold in OWN}) >= 190
    assert not {kind for _, kind in KINDS_OF_OWN} & ({*WRITINGS} | {*NEAR_MISSES})


def test_whole_responses_are_given_as_they_are_and_answers_in_a_box() -> None:
    whole = next(pair for pair in PAIRS if pair.kind == "sentence: denied")
    assert whole.response == whole.answer == "The answer is not $5$."
    assert of(Inequality("<", Fraction(5)), "bound alone").response == r"\boxed{5}"


def test_the_documents_state_how_many_kinds_there_are() -> None:
    text = " ".join((ROOT / "docs" / "verifiers.md").read_text(encoding="utf-8").split())
    own = Counter(same for same, _ in KINDS_OF_OWN)
    assert f"each of 1,335 golds ({len(WRITINGS)} kinds) and near-misses ({len(NEAR_MISSES)} kinds)" in text
    kinds = f"{own[True]} kinds of writings, {own[False]} of near-misses"
    assert f"{len(OWN)} golds of our own ({kinds}, {len(PAIRS):,} pairs)" in text
    confirmed = verifiers.check_labels(PAIRS)
    assert f"confirms {confirmed:,} labels" in text
    assert f"(the other {len(PAIRS) - confirmed:,})" in text


def test_no_verdict_is_wrong_but_those_that_are_listed_as_open() -> None:
    listed = [line for line in OPEN.read_text(encoding="utf-8").splitlines() if line and not line.startswith("#")]
    assert {re.sub(r".* ‖ ", "", line) for line in listed} <= {kind for _, kind in KINDS_OF_OWN}
    assert len(listed) == len(set(listed))
    _, _, mistaken = verifiers.measured(verifiers.ours(), verifiers.drawn(PAIRS, per_kind=5))
    assert [line for line in map(verifiers.line, mistaken) if line not in listed] == []
