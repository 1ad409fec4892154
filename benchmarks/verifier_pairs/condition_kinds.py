r"""Kinds of pairs of inequalities, chains of two, unions of rays, and congruences.

Left out: the same condition on another letter, which is another one only if the question names the letter.
"""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction

from verifier_pairs.condition_forms import (
    OTHER_STRICTNESS,
    SIGNS,
    TURNED,
    Between,
    Congruence,
    Inequality,
    Outside,
    between,
    outside,
)
from verifier_pairs.own_kinds import Answer, exact, number, right, wrong


@right(Inequality)
def sides_exchanged(gold: Inequality) -> Iterator[Answer]:
    yield f"{number(gold.bound)} {SIGNS[TURNED[gold.sign]]} x", gold.meaning


@right(Inequality)
def both_sides_times_three(gold: Inequality) -> Iterator[Answer]:
    yield f"3x {SIGNS[gold.sign]} {number(3 * gold.bound)}", f"3 * x {gold.sign} {exact(3 * gold.bound)}"


@right(Inequality)
def both_sides_times_minus_two(gold: Inequality) -> Iterator[Answer]:
    sign = TURNED[gold.sign]
    yield f"-2x {SIGNS[sign]} {number(-2 * gold.bound)}", f"-2 * x {sign} {exact(-2 * gold.bound)}"


@right(Inequality)
def seven_added_to_both_sides(gold: Inequality) -> Iterator[Answer]:
    yield f"x + 7 {SIGNS[gold.sign]} {number(gold.bound + 7)}", f"x + 7 {gold.sign} {exact(gold.bound + 7)}"


@right(Inequality)
def compared_with_zero(gold: Inequality) -> Iterator[Answer]:
    operator = "-" if gold.bound >= 0 else "+"
    yield f"x {operator} {number(abs(gold.bound))} {SIGNS[gold.sign]} 0", f"x - {exact(gold.bound)} {gold.sign} 0"


@right(Inequality)
def as_an_interval(gold: Inequality) -> Iterator[Answer]:
    bound = number(gold.bound)
    left, right_bracket = "(" if gold.sign == ">" else "[", ")" if gold.sign == "<" else "]"
    below = gold.sign[0] == "<"
    yield (rf"(-\infty, {bound}{right_bracket}" if below else rf"{left}{bound}, \infty)"), gold.meaning


@right(Inequality)
def as_a_set(gold: Inequality) -> Iterator[Answer]:
    yield rf"\{{x : {gold.text}\}}", gold.meaning


@wrong(Inequality)
def strict_against_weak(gold: Inequality) -> Iterator[Answer]:
    other = Inequality(OTHER_STRICTNESS[gold.sign], gold.bound)
    yield other.text, other.meaning


@wrong(Inequality)
def direction_turned(gold: Inequality) -> Iterator[Answer]:
    other = Inequality(TURNED[gold.sign], gold.bound)
    yield other.text, other.meaning


@wrong(Inequality)
def bound_one_more(gold: Inequality) -> Iterator[Answer]:
    other = Inequality(gold.sign, gold.bound + 1)
    yield other.text, other.meaning


@wrong(Inequality)
def bound_a_trace_more(gold: Inequality) -> Iterator[Answer]:
    other = Inequality(gold.sign, gold.bound + Fraction(1, 1000))
    yield other.text, other.meaning


@wrong(Inequality)
def bound_ten_times(gold: Inequality) -> Iterator[Answer]:
    other = Inequality(gold.sign, gold.bound * 10)
    if gold.bound:
        yield other.text, other.meaning


@wrong(Inequality)
def bound_negated(gold: Inequality) -> Iterator[Answer]:
    other = Inequality(gold.sign, -gold.bound)
    if gold.bound:
        yield other.text, other.meaning


@wrong(Inequality)
def bound_alone(gold: Inequality) -> Iterator[Answer]:
    yield number(gold.bound), f"x == {exact(gold.bound)}"


@wrong(Inequality)
def equal_to_the_bound(gold: Inequality) -> Iterator[Answer]:
    yield f"x = {number(gold.bound)}", f"bool(x == {exact(gold.bound)})"


@wrong(Inequality)
def times_minus_two_but_not_turned(gold: Inequality) -> Iterator[Answer]:
    yield f"-2x {SIGNS[gold.sign]} {number(-2 * gold.bound)}", f"-2 * x {gold.sign} {exact(-2 * gold.bound)}"


@wrong(Inequality)
def only_one_side_times_three(gold: Inequality) -> Iterator[Answer]:
    if gold.bound:
        yield f"3x {SIGNS[gold.sign]} {number(gold.bound)}", f"3 * x {gold.sign} {exact(gold.bound)}"


@right(Between)
def read_from_the_right(gold: Between) -> Iterator[Answer]:
    second, first = SIGNS[TURNED[gold.second]], SIGNS[TURNED[gold.sign]]
    yield f"{number(gold.high)} {second} x {first} {number(gold.low)}", gold.meaning


@right(Between)
def chain_times_three(gold: Between) -> Iterator[Answer]:
    middle = f"{SIGNS[gold.sign]} 3x {SIGNS[gold.second]}"
    meaning = between(3 * gold.low, gold.sign, gold.second, 3 * gold.high).replace("x", "3 * x")
    yield f"{number(3 * gold.low)} {middle} {number(3 * gold.high)}", meaning


@right(Between)
def chain_as_an_interval(gold: Between) -> Iterator[Answer]:
    if gold.sign == "<=" or gold.second == "<=":  # an open one may be a point
        yield interval(gold), gold.meaning


@right(Between)
def member_of_the_interval(gold: Between) -> Iterator[Answer]:
    yield rf"x \in {interval(gold)}", gold.meaning


@right(Between)
def two_inequalities(gold: Between) -> Iterator[Answer]:
    first = f"x {SIGNS[TURNED[gold.sign]]} {number(gold.low)}"
    yield rf"{first} \text{{ and }} x {SIGNS[gold.second]} {number(gold.high)}", gold.meaning


def interval(gold: Between) -> str:
    left, right_bracket = "[" if gold.sign == "<=" else "(", "]" if gold.second == "<=" else ")"
    return f"{left}{number(gold.low)}, {number(gold.high)}{right_bracket}"


@wrong(Between)
def other_first_sign(gold: Between) -> Iterator[Answer]:
    other = Between(gold.low, OTHER_STRICTNESS[gold.sign], gold.second, gold.high)
    yield other.text, other.meaning


@wrong(Between)
def other_second_sign(gold: Between) -> Iterator[Answer]:
    other = Between(gold.low, gold.sign, OTHER_STRICTNESS[gold.second], gold.high)
    yield other.text, other.meaning


@wrong(Between)
def upper_bound_raised(gold: Between) -> Iterator[Answer]:
    other = Between(gold.low, gold.sign, gold.second, gold.high + Fraction(1, 100))
    yield other.text, other.meaning


@wrong(Between)
def lower_bound_lost(gold: Between) -> Iterator[Answer]:
    yield Inequality(gold.second, gold.high).text, Inequality(gold.second, gold.high).meaning


@wrong(Between)
def outside_of_it(gold: Between) -> Iterator[Answer]:
    low, high = f"x < {number(gold.low)}", f"x > {number(gold.high)}"
    yield rf"{low} \text{{ or }} {high}", outside(gold.low, "<", ">", gold.high)


@right(Outside)
def rays_joined_by_or(gold: Outside) -> Iterator[Answer]:
    low, high = Inequality(gold.sign, gold.low), Inequality(gold.second, gold.high)
    yield rf"{low.text} \text{{ or }} {high.text}", f"bool({low.meaning}) or bool({high.meaning})"


@right(Outside)
def rays_in_reverse(gold: Outside) -> Iterator[Answer]:
    yield r" \cup ".join(reversed(gold.text.split(r" \cup "))), gold.meaning


@right(Outside)
def reals_without_an_interval(gold: Outside) -> Iterator[Answer]:
    left, right_bracket = "[" if gold.sign == "<" else "(", "]" if gold.second == ">" else ")"
    excluded = f"{left}{number(gold.low)}, {number(gold.high)}{right_bracket}"
    yield rf"\mathbb{{R}} \setminus {excluded}", gold.meaning


@wrong(Outside)
def one_end_closed_or_opened(gold: Outside) -> Iterator[Answer]:
    other = Outside(gold.low, OTHER_STRICTNESS[gold.sign], gold.second, gold.high)
    yield other.text, other.meaning


@wrong(Outside)
def one_end_moved(gold: Outside) -> Iterator[Answer]:
    other = Outside(gold.low, gold.sign, gold.second, gold.high + 1)
    yield other.text, other.meaning


@wrong(Outside)
def one_ray_alone(gold: Outside) -> Iterator[Answer]:
    yield gold.text.split(r" \cup ")[0], f"bool(x {gold.sign} {exact(gold.low)})"


@wrong(Outside)
def the_gap(gold: Outside) -> Iterator[Answer]:
    other = Between(gold.low, "<", "<", gold.high)
    yield other.text, other.meaning


@wrong(Outside)
def rays_joined_by_and(gold: Outside) -> Iterator[Answer]:
    low, high = Inequality(gold.sign, gold.low), Inequality(gold.second, gold.high)
    yield rf"{low.text} \text{{ and }} {high.text}", "x != x"


@right(Congruence)
def another_representative(gold: Congruence) -> Iterator[Answer]:
    for residue in (gold.residue + gold.modulus, gold.residue - gold.modulus):
        yield Congruence(residue, gold.modulus).text, Congruence(residue, gold.modulus).meaning


@right(Congruence)
def mod_without_brackets(gold: Congruence) -> Iterator[Answer]:
    yield rf"x \equiv {gold.residue} \mod {gold.modulus}", gold.meaning


@right(Congruence)
def mod_in_brackets_as_text(gold: Congruence) -> Iterator[Answer]:
    yield rf"x \equiv {gold.residue} \; (\text{{mod }} {gold.modulus})", gold.meaning


@wrong(Congruence)
def residue_raised(gold: Congruence) -> Iterator[Answer]:
    yield Congruence(gold.residue + 1, gold.modulus).text, Congruence(gold.residue + 1, gold.modulus).meaning


@wrong(Congruence)
def modulus_raised(gold: Congruence) -> Iterator[Answer]:
    yield Congruence(gold.residue, gold.modulus + 1).text, Congruence(gold.residue, gold.modulus + 1).meaning


@wrong(Congruence)
def modulus_doubled(gold: Congruence) -> Iterator[Answer]:
    yield Congruence(gold.residue, 2 * gold.modulus).text, Congruence(gold.residue, 2 * gold.modulus).meaning


@wrong(Congruence)
def residue_negated(gold: Congruence) -> Iterator[Answer]:
    if 2 * gold.residue % gold.modulus:
        yield Congruence(-gold.residue, gold.modulus).text, Congruence(-gold.residue, gold.modulus).meaning


@wrong(Congruence)
def residue_alone(gold: Congruence) -> Iterator[Answer]:
    yield f"x = {gold.residue}", f"x == {gold.residue}"


@wrong(Congruence)
def congruence_denied(gold: Congruence) -> Iterator[Answer]:
    yield (
        rf"x \not\equiv {gold.residue} \pmod{{{gold.modulus}}}",
        f"x % {gold.modulus} != {gold.residue % gold.modulus}",
    )
