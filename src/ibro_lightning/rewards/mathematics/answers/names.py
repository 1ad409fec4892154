"""What an answer says besides its value: both signs of a ±, and the names that values are given."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import product

from ibro_lightning.rewards.mathematics.answers.node import STRUCTURES, Node, is_term, mapped, symbols
from ibro_lightning.rewards.mathematics.answers.number_words import denies
from ibro_lightning.rewards.mathematics.answers.rationals import Uncertain, exact
from ibro_lightning.rewards.mathematics.answers.values import Evaluation
from ibro_lightning.rewards.mathematics.answers.vocabulary import words

_MAX_SIGNS = 4
_PARTS = words("half twice double third quarter")


def without_signs(node: Node) -> Node:
    """``1 ± √5`` as the list of its two values; inside a list or set, among its elements."""
    if not _has_sign(node):
        return node
    if node.op in ("list", "set"):
        return Node(node.op, tuple(item for part in node.args for item in _elements(without_signs(part), part)))
    if node.op == "relation" and node.args[1] == "=" and len(node.args) == 3:
        name, _, value = node.args
        values = _elements(without_signs(value), value)
        return Node("list", tuple(Node("relation", (name, "=", one)) for one in values)) if len(values) > 1 else node
    if node.op in STRUCTURES - {"matrix", "tuple"}:
        return node
    if _signs(node) > 1:  # ±1 ± 2: each by itself, where there is no ∓ to go with
        return Node("list", tuple(_independent(node)))
    upper, lower = _one_sign(node, True), _one_sign(node, False)
    return upper if exact(upper) is not None and exact(upper) == exact(lower) else Node("list", (upper, lower))


def _one_sign(node: Node, upper: bool) -> Node:
    return mapped(node, lambda part: _with_sign(part, upper))


def _signs(node: Node) -> int:
    """How many ±, if there are no ∓; else 0."""
    if node.op == "minusplus":
        return -_MAX_SIGNS
    return (node.op == "plusminus") + sum(map(_signs, node.nodes()))


def _independent(node: Node) -> Iterator[Node]:
    """The term with each ± as + and as −."""
    count = _signs(node)
    if count > _MAX_SIGNS:
        raise Uncertain("too many signs")
    for choice in product((True, False), repeat=count):
        signs = iter(choice)
        yield mapped(node, partial(_with_next_sign, signs))


def _with_next_sign(signs: Iterator[bool], node: Node) -> Node:
    return _with_sign(node, next(signs)) if node.op == "plusminus" else node


def _elements(changed: Node, before: Node) -> Sequence[Node]:
    return changed.args if changed.op == "list" and before.op != "list" else (changed,)


def _has_sign(node: Node) -> bool:
    return node.op in ("plusminus", "minusplus") or any(_has_sign(part) for part in node.nodes())


def _with_sign(node: Node, upper: bool) -> Node:
    if node.op == "plusminus":
        return node.args[0] if upper else Node("neg", node.args)
    if node.op == "minusplus":
        return Node("neg", node.args) if upper else node.args[0]
    return node


def other_names(gold: Node, answer: Node) -> bool:
    """Whether both are values of a symbol each, and these are two."""
    if gold.op == answer.op == "mul":  # N(0, 1) and U(0, 1)
        return all(_names_point(node) for node in (gold, answer)) and gold.args[0] != answer.args[0]
    names = [node.args[0] for node in (gold, answer) if node.op == "relation" and node.args[1] in ("=", "in")]
    if sorted(name.op for name in names) == ["call", "symbol"]:  # y(x) is y
        names = [Node("symbol", name.args[:1]) for name in names]
    return len(names) == 2 and all(is_name(name) for name in names) and names[0] != names[1]


def _names_point(node: Node) -> bool:
    """``A(1, 2)``."""
    head, *rest = node.args
    return len(rest) == 1 and rest[0].op == "tuple" and head.op == "symbol" and bool(head.args[0].isupper())


def of_equations(node: Node) -> Node:
    """The value of an equation that only names it, as ``x = 5`` and ``AB = 4``; of a list of such, the list of values,
    in order. Anything else unchanged."""
    if node.op == "relation" and set(node.args[1::2]) == {"="}:
        return _value(node)
    if node.op == "relation" and node.args[1] == "in" and len(node.args) == 3 and is_name(node.args[0]):
        value: Node = node.args[2]
        return node if is_term(value) and not symbols(value) else value  # no number has elements
    if node.op == "mul" and _names_point(node):
        point: Node = node.args[1]
        return point
    if node.op == "list" and (pairs := named(node)):
        names, values = zip(*pairs, strict=True)
        return Node("list" if len(set(map(_without_index, names))) == 1 else "tuple", tuple(values))
    return node


def _value(node: Node) -> Node:
    """The last member of a chain that begins with a name or has no symbols; ``x = y = 2`` as two equations."""
    first, *middle, last = node.args[::2]
    if first.op == "symbol" and any(denies(word) or word in _PARTS for word in first.args[0].split()):
        return node  # wrong answer = 5
    if middle and all(term.op == "symbol" for term in (first, *middle)) and not symbols(last):
        return of_equations(Node("list", tuple(Node("relation", (term, "=", last)) for term in (first, *middle))))
    if _contradict(
        [term for term in (first, *middle, last) if not (symbols(term) or is_name(term))]
    ):  # 4 = 5, and π = 5
        return node
    if not symbols(node) or (is_name(first) and not any(map(is_name, middle)) and not (middle and is_name(last))):
        return of_equations(last)
    if not middle and is_name(last) and not symbols(first):
        return first
    return node


def _contradict(closed: list[Node]) -> bool:
    """Whether members of a chain that are numbers are not all the same; decimals may be rounded to 1 %."""
    exactly = {exact(term) for term in closed}
    if None not in exactly:
        return len(exactly) > 1
    if not all(map(is_term, closed)):
        return False
    try:
        values = [Evaluation()(term) for term in closed]
    except Uncertain:
        return len(closed) > 1
    return any(abs(value - values[0]) > abs(values[0]) / 100 for value in values[1:])


def system(node: Node) -> list[tuple[str, Node]]:
    """The pairs of ``x = 1, y = 2`` and ``(x, y) = (1, 2)``; empty for anything else, also for values of one name."""
    if node.op == "relation" and len(node.args) == 3 and node.args[1] == "=":
        names, values = node.args[0], node.args[2]
        if names.op == values.op == "tuple" and is_name(names) and len(names.args) == len(values.args):
            return [(_name_of(name), value) for name, value in zip(names.args, values.args, strict=True)]
        return []
    pairs = named(node) if node.op == "list" else []
    return pairs if len({name for name, _ in pairs}) == len(pairs) > 1 else []


def of_one_name(pairs: Sequence[tuple[str, Node]]) -> bool:
    """Whether these are values of one name with indices: x_1, x_2."""
    return len({_without_index(name) for name, _ in pairs}) == 1 and pairs[0][0][:1] in "xyzrt"


def _without_index(name: str) -> str:
    return re.sub(r"_\d+$", "", name)


def named(node: Node) -> list[tuple[str, Node]]:
    """The pairs in ``x = 1, y = 2``; of ``n = 2, 3, 4`` the three values of n. Empty for anything else."""
    pairs: list[tuple[str, Node]] = []
    for item in node.args:
        if item.op == "relation" and len(item.args) == 3 and item.args[1] == "=" and is_name(item.args[0]):
            pairs.append((_name_of(item.args[0]), item.args[2]))
        elif pairs and item.op not in ("relation", "list"):
            pairs.append((pairs[-1][0], item))
        else:
            return []
    return pairs


_MEASURES = frozenset(["abs", "det", "deg", "dim", "max", "min", "arg", "Re", "Im"])


def is_name(node: Node) -> bool:
    """What an answer may be named by: a symbol, ``f(x)``, ``|AB|``, ``AB``, ``(x, y)``, ``\\frac{dy}{dx}``,
    ``\\cos\\theta``, ``m\\angle A``."""
    if node.op == "symbol" or node in (Node("constant", ("e",)), Node("constant", ("i",))):
        return True
    if node.op == "tuple":
        return all(part.op == "symbol" for part in node.args)
    if node.op == "ratio":
        return all(is_name(part) for part in node.args)
    if node.op == "call":
        name, parts = node.args[0], node.nodes()
        if name in _MEASURES:
            return all(is_name(part) for part in parts)
        if re.fullmatch(r"[A-Za-z]'*(?:_\w+)?(?:\^-1)?", name):
            return True
        return all(part.op == "symbol" and (len(part.args[0]) > 1 or part.args[0].isupper()) for part in parts)
    if node.op == "div":
        return all(part.op == "mul" and part.args[0] == Node("symbol", ("d",)) for part in node.args)
    if node.op == "mul":
        names = [part.args[0] for part in node.args if part.op == "symbol"]
        upright = all(name[0].isupper() or not name.isascii() for name in names) or names[-1].startswith("angle ")
        return len(names) == len(node.args) and upright
    return False


def _name_of(node: Node) -> str:
    return str(node.args[0]) if node.op == "symbol" else repr(node)


def named_value(node: Node) -> Node:
    """``f(x)`` as one symbol, as in 0 < f(x) < 1."""
    if (
        node.op == "call"
        and is_name(node)
        and all(part.op == "symbol" for part in node.nodes())
        and len(node.args[0]) == 1
    ):
        return Node("symbol", (repr(node),))
    return node


def renamed(node: Node) -> Node:
    """The same with symbols called by the order in which they come."""
    names: dict[str, str] = {}

    def rename(part: Node) -> Node:
        if part.op == "tuple":
            return Node("list", part.args)
        if part.op == "symbol":
            return Node("symbol", (names.setdefault(part.args[0], f"s{len(names)}"),))
        return part

    return mapped(node, rename)
