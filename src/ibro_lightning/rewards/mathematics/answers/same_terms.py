"""Whether two terms are the same: numbers by their values, terms with symbols by their values at many points."""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction
from itertools import pairwise
from typing import Any

from ibro_lightning.rewards.mathematics.answers.assignments import points
from ibro_lightning.rewards.mathematics.answers.decimals import half_unit, shown
from ibro_lightning.rewards.mathematics.answers.node import Node, calls, is_term, symbols
from ibro_lightning.rewards.mathematics.answers.rationals import Uncertain, exact, exact_at, is_rational_expression
from ibro_lightning.rewards.mathematics.answers.rules import Judgement, Rules, no, yes
from ibro_lightning.rewards.mathematics.answers.values import (
    DIGITS,
    Evaluation,
    agree,
    context,
    digits,
    hashed,
    is_rational,
    same_value,
)

_TURNED = {"<": ">", ">": "<", "<=": ">=", ">=": "<="}
_DIGITS_OF_RELATIONS = 4 * DIGITS
"""So many that 2^n − 10^200 and 2^n − 10^201 are not proportional at a small n."""
_ENOUGH = 3
"""At so many points two terms must have been compared before they count as the same."""


def same_terms(gold: Node, answer: Node, rules: Rules) -> Judgement:
    if not (is_term(gold) and is_term(answer)):
        return no("another form")
    for op in ("degree", "percent"):  # the sign may be left out, as a unit
        if (gold.op == op) != (answer.op == op) and not _must_show(op, gold, answer):
            bare = [node.args[0] if node.op == op else node for node in (gold, answer)]
            if rules.units != "required" and (found := _values(bare[0], bare[1], rules)).same:
                return found
    return _values(gold, answer, rules)


def _must_show(op: str, gold: Node, answer: Node) -> bool:
    """Whether leaving the sign out, or adding it, makes another value: 0.2 % is not 0.2, nor 90 radians 90 degrees."""
    if any(node.op == "call" and node.args[0] == "radians" for node in (gold, answer)):
        return True
    if op == "degree" and any(_has_pi(node) for node in (gold, answer)):  # π/6 is an angle without the sign
        return True
    value = exact(gold)
    return op == "percent" and answer.op == op and (value is None or value.denominator != 1 or abs(value) <= 1)


def _has_pi(node: Node) -> bool:
    return node == Node("constant", ("pi",)) or any(map(_has_pi, node.nodes()))


def _values(gold: Node, answer: Node, rules: Rules) -> Judgement:
    if symbols(gold) or symbols(answer):
        return _identity(gold, answer)
    infinite = [_infinite(node) for node in (gold, answer)]
    if any(infinite):
        return yes("exact") if infinite[0] == infinite[1] else no("another value")
    values = exact(gold), exact(answer)
    if values[0] is not None and values[0] == values[1]:
        return yes("exact")
    if _rounds(gold, answer, rules) or _rounds(answer, gold, rules):
        return yes("rounded")
    if None not in values:
        return no("another value")
    return _numeric(gold, answer)


def _infinite(node: Node) -> int:
    if node.op == "constant" and node.args[0] == "inf":
        return 1
    return -_infinite(node.args[0]) if node.op == "neg" else 0


def _rounds(decimal: Node, other: Node, rules: Rules) -> bool:
    """Whether ``decimal`` shows enough digits to stand for what rounds to it, and ``other`` does."""
    written = shown(decimal)
    if written is None or written.places is None or written.significant is None:
        return False
    if min(written.places, written.significant) < rules.decimals:
        return False
    half = half_unit(written)
    value = exact(other)
    if value is not None:
        if _terminates(value.denominator):  # a decimal could say it exactly
            return False
        return abs(value - written.value) < half
    mp = context()
    computed = Evaluation()(other)
    distance = abs(computed - mp.mpf(written.value.numerator) / written.value.denominator)
    return bool(distance < mp.mpf(half.numerator) / half.denominator)


def _terminates(denominator: int) -> bool:
    for prime in (2, 5):
        while denominator % prime == 0:
            denominator //= prime
    return denominator == 1


def _numeric(gold: Node, answer: Node) -> Judgement:
    if is_rational(gold) and is_rational(answer):
        return no("too large")
    real = not (_has_i(gold) or _has_i(answer))
    same = any(same_value(gold, answer, {}, real=real, log=log) for log in _bases(gold, answer))
    return yes("numeric") if same else no("another value")


def _bases(*nodes: Node) -> tuple[str, ...]:
    """The bases that ``\\log`` may have: e or 10, one for both sides."""
    return ("e", "10") if any("log" in calls(node) for node in nodes) else ("e",)


def _has_i(node: Node) -> bool:
    return node == Node("constant", ("i",)) or any(_has_i(part) for part in node.nodes())


def _identity(gold: Node, answer: Node) -> Judgement:
    if (pairs := _exact_pairs(gold, answer)) is not None:
        return yes("identity") if all(first == second for first, second in pairs) else no("another expression")
    real = not (_has_i(gold) or _has_i(answer))
    for log in _bases(gold, answer):
        compared = 0
        for assignment in points(gold, answer):
            same = same_value(gold, answer, assignment, real=real, log=log)
            if same is False:
                compared = 0
                break
            compared += same is True
        if compared >= _ENOUGH:
            return yes("identity")
    return no("another expression")


def _exact_pairs(gold: Node, answer: Node) -> list[tuple[Fraction, Fraction]] | None:
    """The exact values of two rational expressions at three points; None for other terms. The points are whole numbers
    from −2^30 to 2^30 that belong to the symbols' names, as good as random to whoever does not compute them: of random
    ones, two expressions that differ, of degree d, would agree at all three with a probability of at most (d/2^31)^3
    (Schwartz and Zippel)."""
    if not (is_rational_expression(gold) and is_rational_expression(answer)):
        return None
    names, found = symbols(gold) | symbols(answer), list[tuple[Fraction, Fraction]]()
    for place in range(4 * _ENOUGH):
        assignment = {name: hashed(f"{name} exact {place}", 1)[0] % 2**31 - 2**30 for name in names}
        first, second = exact_at(gold, assignment), exact_at(answer, assignment)
        if first is not None and second is not None:
            found.append((first, second))
        if len(found) == _ENOUGH:
            return found
    return None


def _compared(gold: Node, answer: Node) -> Iterator[tuple[Any, Any, Any]]:
    """The values of both at all points where both have one, and their scale: a real one, unless i is in them."""
    mp, real = context(), not (_has_i(gold) or _has_i(answer))
    for assignment in points(gold, answer):
        evaluation = Evaluation(assignment, real=real)
        try:
            values = evaluation(gold), evaluation(answer)
        except Uncertain:
            continue
        if real and any(mp.im(value) != 0 for value in values):
            continue
        yield *values, evaluation.scale


def same_relations(gold: Node, answer: Node) -> Judgement:
    """Relations of two sides: equal if their differences are proportional, by a factor of the right sign."""
    operator, other = gold.args[1], answer.args[1]
    if operator != other and _TURNED.get(operator) != other:
        return no("another relation")
    left, right = (Node("add", (node.args[0], Node("neg", (node.args[2],)))) for node in (gold, answer))
    if not (symbols(left) or symbols(right)):
        return no("no symbols")
    if (pairs := _exact_pairs(left, right)) is not None:
        return _proportional(pairs, operator, other)
    with digits(_DIGITS_OF_RELATIONS):
        return _proportional_at_points(left, right, operator, other)


def _proportional_at_points(left: Node, right: Node, operator: str, other: str) -> Judgement:
    quotients = []
    for first, second, scale in _compared(left, right):
        if max(abs(first), abs(second)) < scale * context().mpf(10) ** -50:
            continue  # too much has cancelled to compare
        zero = [agree(value, 0, scale) for value in (first, second)]
        if zero[0] != zero[1]:
            return no("another relation")
        if not zero[0]:
            quotients.append(first / second)
    if len(quotients) < _ENOUGH or not all(agree(a, b, 0) for a, b in pairwise(quotients)):
        return no("another relation")
    if operator in _TURNED and (
        context().im(quotients[0]) != 0 or (context().re(quotients[0]) > 0) != (operator == other)
    ):
        return no("another relation")
    return yes("identity")


def _proportional(pairs: list[tuple[Fraction, Fraction]], operator: str, other: str) -> Judgement:
    if len({first for first, _ in pairs}) == 1:  # x + 1 = x
        return no("no condition")
    quotients = {first / second if second else None for first, second in pairs}
    quotient = quotients.pop()
    if quotients or not quotient or (operator in _TURNED and (quotient > 0) != (operator == other)):
        return no("another relation")
    return yes("identity")
