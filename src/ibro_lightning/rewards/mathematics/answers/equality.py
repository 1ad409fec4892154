"""Whether an answer is the gold, kind by kind, and how that was decided. The rules in words: ``docs/verifiers.md``."""

from __future__ import annotations

from collections.abc import Sequence

from ibro_lightning.rewards.mathematics.answers.arrays import table, vector
from ibro_lightning.rewards.mathematics.answers.assignments import points
from ibro_lightning.rewards.mathematics.answers.names import (
    named,
    named_value,
    of_equations,
    of_one_name,
    other_names,
    renamed,
    system,
    without_signs,
)
from ibro_lightning.rewards.mathematics.answers.node import Node, integer, is_term, mapped, size, symbols
from ibro_lightning.rewards.mathematics.answers.numerals import in_base_ten
from ibro_lightning.rewards.mathematics.answers.parameters import (
    has_constant,
    is_congruence,
    same_antiderivatives,
    same_congruences,
    with_names_of,
)
from ibro_lightning.rewards.mathematics.answers.quantities import as_angle, same_quantities, without_units
from ibro_lightning.rewards.mathematics.answers.rationals import Uncertain
from ibro_lightning.rewards.mathematics.answers.relations import as_interval, ascending, is_relation
from ibro_lightning.rewards.mathematics.answers.rules import Judgement, Rules, no, weakest, yes
from ibro_lightning.rewards.mathematics.answers.same_terms import same_relations, same_terms
from ibro_lightning.rewards.mathematics.answers.subsets import conditions, is_subset, same_subset, symbols_of_subset
from ibro_lightning.rewards.mathematics.answers.texts import as_written, same_words
from ibro_lightning.rewards.mathematics.answers.times import may_be_time, same_times
from ibro_lightning.rewards.mathematics.answers.values import Evaluation, context

_MAX_ITEMS = 100
_OF_NUMBERS = {"relation", "any", "all", "interval", "union", "intersection", "difference"}


def compare(gold: Node, answer: Node, rules: Rules) -> Judgement:
    """Whether two answers are the same by ``rules``."""
    if not rules.names:
        gold, answer = renamed(gold), renamed(answer)
    answer = with_names_of(gold, answer)
    if rules.simplified and size(of_equations(answer)) > size(of_equations(gold)):
        return no("not simplified")
    if (gold.op == "set") != (answer.op == "set"):  # {5} for 5
        gold, answer = (node.args[0] if node.op == "set" and len(node.args) == 1 else node for node in (gold, answer))
    try:
        return _same(gold, answer, rules)
    except (ArithmeticError, ValueError, IndexError, TypeError, RecursionError):
        return no("no value")


def _same(gold: Node, answer: Node, rules: Rules) -> Judgement:
    gold, answer = as_written(as_angle(gold), as_angle(answer))
    if gold == answer:
        return yes("exact")
    signs = [without_signs(node) for node in (gold, answer)]
    if signs != [gold, answer]:
        return _same(signs[0], signs[1], rules)
    pairs = [system(node) for node in (gold, answer)]
    if pairs[0] and not pairs[1] and answer.op == "list" and named(answer):
        return no("other names")
    if all(pairs) and not all(map(of_one_name, pairs)):
        return _systems(pairs[0], pairs[1], rules)
    values = [of_equations(node) for node in (gold, answer)]
    if values != [gold, answer] and (any(pairs) or not other_names(gold, answer)):
        found = _same(values[0], values[1], rules)
        if found.same or any(pairs):
            return found
    if is_subset(answer) or answer.op == "list":
        gold = conditions(gold)
    if is_subset(gold) or gold.op == "list":
        answer = conditions(answer)
    if {gold.op, answer.op} & _OF_NUMBERS:
        plain = without_units(gold, answer, rules)
        if plain is None:
            return no("another unit")
        gold, answer = plain
    if "relation" in (gold.op, answer.op) or {gold.op, answer.op} & {"any", "all"}:
        return _relations(gold, answer, rules)
    if is_subset(gold) or is_subset(answer):
        return _subsets(gold, answer, rules)
    for op, compared in _BY_KIND.items():
        if op in (gold.op, answer.op):
            return compared(gold, answer, rules)
    found = same_terms(gold, answer, rules)
    return found if found.same or not has_constant(gold) else same_antiderivatives(gold, answer, rules)


def _relations(gold: Node, answer: Node, rules: Rules) -> Judgement:
    if gold.op == answer.op and gold.op in ("any", "all") and len(symbols(gold)) > 1:
        return _unordered(gold.args, answer.args, rules, "relation")
    if is_congruence(gold) and is_congruence(answer):
        return same_congruences(gold, answer, rules)
    intervals = as_interval(gold), as_interval(answer)
    if rules.relations_as_sets and all(node.op == "interval" and symbols(node) for node in intervals):
        return yes("set") if _alike(*intervals, rules) else no("another set")
    if is_subset(gold) or is_subset(answer):
        if not rules.relations_as_sets and is_relation(answer) and not is_relation(gold):
            return no("a relation for a set")
        inequalities = gold.op == answer.op == "relation" and "in" not in (gold.args[1], answer.args[1])
        if inequalities and (found := _same_sides(ascending(gold), ascending(answer), rules)).same:
            return found
        return _subsets(gold, answer, rules)
    if gold.op == answer.op and gold.op in ("any", "all"):
        return _unordered(gold.args, answer.args, rules, "relation")
    if gold.op == answer.op == "relation":
        return _same_sides(ascending(gold), ascending(answer), rules)
    return no("another form")


def _same_sides(gold: Node, answer: Node, rules: Rules) -> Judgement:
    if len(gold.args) == len(answer.args) == 3 and all(map(is_term, (*gold.args[::2], *answer.args[::2]))):
        return same_relations(gold, answer)
    if gold.args[1::2] != answer.args[1::2]:
        return no("another form")
    sides = zip(gold.args[::2], answer.args[::2], strict=True)
    return weakest([_same(left, right, rules) for left, right in sides], "relation")


def _subsets(gold: Node, answer: Node, rules: Rules) -> Judgement:
    if _alike(gold, answer, rules):
        return yes("set")
    if gold.op == answer.op and gold.op in ("union", "intersection") and _symbolic(gold) and _symbolic(answer):
        return _unordered(gold.args, answer.args, rules, "set")
    gold, answer = (mapped(node, named_value) for node in (gold, answer))
    for node in (gold, answer):
        if node.op == "list" or not (is_subset(node) or node.op in ("tuple", "closed", "set")):
            return no("another form")
    both = [symbols_of_subset(node) for node in (gold, answer)]
    if max(map(len, both)) > 1:
        return no("several symbols")
    if both[0] and both[1] and both[0] != both[1] and {"?"} not in both:
        return no("another symbol")
    same = same_subset(gold, answer)
    return Judgement(same, "set" if same else "another set")


def _symbolic(node: Node) -> bool:
    """A union or intersection of sets that are only named."""
    return all(part.op == "symbol" for part in node.args)


def _alike(gold: Node, answer: Node, rules: Rules) -> bool:
    """Whether two sets are written in the same way, with the same ends."""
    if gold.op != answer.op or len(gold.args) != len(answer.args) or gold.op not in ("interval", "closed", "union"):
        return False
    return all(
        left == right if isinstance(left, str) else _same(left, right, rules).same
        for left, right in zip(gold.args, answer.args, strict=True)
    )


def _ordered(gold: Node, answer: Node, rules: Rules) -> Judgement:
    if len(gold.args) != len(answer.args):
        return no("another number of entries")
    return weakest([_same(left, right, rules) for left, right in zip(gold.args, answer.args, strict=True)], gold.op)


def _unordered(gold: Sequence[Node], answer: Sequence[Node], rules: Rules, why: str) -> Judgement:
    if len(gold) != len(answer):
        return no("another number of elements")
    if len(gold) > _MAX_ITEMS:
        return no("too many elements")
    left = list(answer)
    keys = [_key(item) for item in left]
    for item in gold:
        likely: list[int] = []
        key = _key(item)
        for place, other in enumerate(keys):  # those of about the same value first
            likely.insert(0 if key and other == key else len(likely), place)
        found = next((place for place in likely if _same(item, left[place], rules).same), None)
        if found is None:
            return no("another element")
        del left[found], keys[found]
    return yes(why)


def _key(node: Node) -> str:
    """Twelve digits of a term's value at one point; "" for other nodes."""
    if not is_term(node):
        return ""
    try:
        evaluation = Evaluation(points(node)[0])
        return str(context().nstr(evaluation(node), 12))
    except Uncertain:
        return ""


def _distinct(items: Sequence[Node], rules: Rules) -> list[Node]:
    kept: list[Node] = []
    by_key: dict[str, list[Node]] = {}
    if len(items) > _MAX_ITEMS:
        raise Uncertain("too many elements")
    for item in items:
        key = _key(item)
        if not any(_same(item, other, rules).same for other in by_key.get(key, ())):
            kept.append(item)
            by_key.setdefault(key, []).append(item)
    return kept


def _sets(gold: Node, answer: Node, rules: Rules) -> Judgement:
    if "text" in (gold.op, answer.op):
        return same_words(gold, answer)
    kinds = {gold.op, answer.op}
    if kinds == {"set"}:
        return _unordered(_distinct(gold.args, rules), _distinct(answer.args, rules), rules, "set")
    if kinds == {"set", "list"}:
        return _unordered(gold.args, answer.args, rules, "set")
    if kinds & {"tuple", "closed"}:
        return no("a set has no order")
    return no("another number of elements")


def _lists(gold: Node, answer: Node, rules: Rules) -> Judgement:
    kinds = (gold.op, answer.op)
    if kinds == ("list", "list"):
        if rules.order:
            return _ordered(gold, answer, rules)
        return _unordered(gold.args, answer.args, rules, "list")
    if set(kinds) == {"list", "tuple"}:
        return _ordered(gold, answer, rules)
    return no("another number of elements")


def _systems(gold: list[tuple[str, Node]], answer: list[tuple[str, Node]], rules: Rules) -> Judgement:
    """``x = 1, y = 2`` in any order, by name."""
    others = dict(answer)
    if {name for name, _ in gold} != others.keys():
        return no("other names")
    return weakest([_same(value, others[name], rules) for name, value in gold], "list")


def _tuples(gold: Node, answer: Node, rules: Rules) -> Judgement:
    vectors = [vector(node) for node in (gold, answer)]
    if gold.op == answer.op or "matrix" in (gold.op, answer.op):
        if vectors[0] is None or vectors[1] is None:
            return no("another form")
        return _ordered(Node("tuple", vectors[0]), Node("tuple", vectors[1]), rules)
    return no("another form")


def _matrices(gold: Node, answer: Node, rules: Rules) -> Judgement:
    tables = [table(node) for node in (gold, answer)]
    if tables[0] is not None and tables[1] is not None:
        if [len(row) for row in tables[0]] != [len(row) for row in tables[1]]:
            return no("another shape")
        pairs = zip(tables[0], tables[1], strict=True)
        return weakest(
            [_same(a, b, rules) for left, right in pairs for a, b in zip(left, right, strict=True)], "matrix"
        )
    return _tuples(gold, answer, rules)


def _cases(gold: Node, answer: Node, rules: Rules) -> Judgement:
    if gold.op != answer.op:
        return no("another form")
    rows = [[Node("tuple", row) for row in node.args] for node in (gold, answer)]
    return _unordered(rows[0], rows[1], rules, "cases")


def _ratios(gold: Node, answer: Node, rules: Rules) -> Judgement:
    if gold.op != answer.op:
        terms, other = (gold.args, answer) if gold.op == "ratio" else (answer.args, gold)
        if len(terms) != 2 or not is_term(other):
            return no("another form")
        return same_terms(Node("div", tuple(terms)), other, rules)
    if len(gold.args) != len(answer.args):
        return no("another number of entries")
    if may_be_time(gold):
        return weakest([_same(a, b, rules) for a, b in zip(gold.args, answer.args, strict=True)], "ratio")
    zeros = [[same_terms(part, integer(0), rules).same for part in node.args] for node in (gold, answer)]
    if zeros[0] != zeros[1] or all(zeros[1]):
        return no("another value")
    place = zeros[0].index(False)
    first, other = gold.args[place], answer.args[place]
    pairs = zip(gold.args, answer.args, strict=True)
    products = [(Node("mul", (first, b)), Node("mul", (other, a))) for a, b in pairs]
    return weakest([same_terms(left, right, rules) for left, right in products], "ratio")


def _based(gold: Node, answer: Node, rules: Rules) -> Judgement:
    """A numeral's base is part of the answer; ten is that of numbers without one."""
    plain = [in_base_ten(node) for node in (gold, answer)]
    return _same(plain[0], plain[1], rules) if plain != [gold, answer] else no("another numeral")


_BY_KIND = {
    "time": lambda gold, answer, rules: same_times(gold, answer),
    "set": _sets,
    "text": lambda gold, answer, rules: same_words(gold, answer),
    "based": _based,
    "list": _lists,
    "matrix": _matrices,
    "cases": _cases,
    "tuple": _tuples,
    "closed": _tuples,
    "ratio": _ratios,
    "quantity": same_quantities,
}
