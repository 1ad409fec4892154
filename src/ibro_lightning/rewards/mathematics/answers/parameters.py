"""Names that mean nothing: constants of integration, the argument of a function, whole numbers that count solutions."""

from __future__ import annotations

from ibro_lightning.rewards.mathematics.answers.node import Node, is_term, mapped, symbols
from ibro_lightning.rewards.mathematics.answers.rationals import exact
from ibro_lightning.rewards.mathematics.answers.rules import Judgement, Rules, no, yes
from ibro_lightning.rewards.mathematics.answers.same_terms import same_terms
from ibro_lightning.rewards.mathematics.answers.vocabulary import words

_CONSTANTS = words("C c K k C_1 c_1 C_0 c_0")
_COUNTING = words("k n m l j")


def with_names_of(gold: Node, answer: Node) -> Node:
    """``answer`` with the gold's names where names mean nothing."""
    names = _argument(gold), _argument(answer)
    if names == ("", ""):
        names = _constant(gold), _constant(answer, _CONSTANTS)
    if "" in names:
        names = _counter(gold, answer)
    theirs, ours = names[1], names[0]
    if "" in names or theirs == ours or ours in symbols(answer):
        return answer
    return mapped(answer, lambda part: Node("symbol", (ours,)) if part == Node("symbol", (theirs,)) else part)


def _argument(node: Node) -> str:
    """x of ``f(x) = …``."""
    if node.op != "relation" or len(node.args) != 3 or node.args[1] != "=" or node.args[0].op != "call":
        return ""
    function, *arguments = node.args[0].args
    return str(arguments[0].args[0]) if len(function) == 1 and [part.op for part in arguments] == ["symbol"] else ""


def _constant(node: Node, names: frozenset[str] = frozenset("C")) -> str:
    """C of ``sin x + C``: a summand by itself, beside terms of one other symbol."""
    terms = node.args if node.op == "add" else ()
    found = [str(part.args[0]) for part in terms if part.op == "symbol" and part.args[0] in names]
    if len(found) != 1 or _count(node, found[0]) != 1:
        return ""
    return found[0] if len(symbols(node)) == 2 else ""


def _count(node: Node, name: str) -> int:
    return (node == Node("symbol", (name,))) + sum(_count(part, name) for part in node.nodes())


def has_constant(node: Node) -> bool:
    return _constant(node) != ""


def _counter(gold: Node, answer: Node) -> tuple[str, str]:
    """k of ``π/2 + kπ`` and n of ``π/2 + nπ``."""
    ours, theirs = _counted(gold), _counted(answer)
    return (ours, theirs) if ours and theirs else ("", "")


def _counted(node: Node) -> str:
    """The symbol that counts solutions: k of "k ∈ ℤ"; or the only symbol, once, in a summand such as ``2kπ`` or
    ``360°·k``."""
    for item in node.args if node.op == "list" else ():
        if item.op == "relation" and item.args[1:] == ("in", Node("symbol", ("mathbb Z",))):
            return str(item.args[0].args[0]) if item.args[0].op == "symbol" else ""
    if node.op == "relation" and len(node.args) == 3 and node.args[1] == "=" and node.args[0].op == "symbol":
        node = node.args[2]
    names = symbols(node)
    if node.op != "add" or len(names) != 1 or not names <= _COUNTING or _count(node, name := next(iter(names))) != 1:
        return ""
    turns = next(part for part in node.args if symbols(part))
    turns = turns.args[0] if turns.op == "neg" else turns
    return name if turns.op == "mul" and Node("symbol", (name,)) in turns.args and _is_angle(turns) else ""


def _is_angle(node: Node) -> bool:
    return node == Node("constant", ("pi",)) or node.op == "degree" or any(map(_is_angle, node.nodes()))


def _without(node: Node, name: str) -> Node:
    rest = [part for part in node.args if part != Node("symbol", (name,))]
    return rest[0] if len(rest) == 1 else Node("add", tuple(rest))


def same_antiderivatives(gold: Node, answer: Node, rules: Rules) -> Judgement:
    """Whether two terms ``… + C`` differ by a constant: whether their difference is the same for two independent
    symbols."""
    name = _constant(gold)
    if not name or _constant(answer) != name or not (is_term(gold) and is_term(answer)):
        return no("another expression")
    difference = Node("add", (_without(gold, name), Node("neg", (_without(answer, name),))))
    elsewhere = mapped(
        difference, lambda part: Node("symbol", (f"{part.args[0]} elsewhere",)) if part.op == "symbol" else part
    )
    same = same_terms(difference, elsewhere, rules).same
    return yes("up to a constant") if same else no("another expression")


def same_congruences(gold: Node, answer: Node, rules: Rules) -> Judgement:
    """``x ≡ 3 (mod 7)``: residues of one modulus that differ by a multiple of it."""
    (residue, modulus), (other, other_modulus) = (node.args[2].args[1:] for node in (gold, answer))
    first, second = exact(residue), exact(other)
    if first is None or second is None or modulus != other_modulus or not (size := exact(modulus)):
        return no("another congruence")
    if not same_terms(gold.args[0], answer.args[0], rules).same:
        return no("another congruence")
    return yes("congruence") if (first - second) % size == 0 else no("another residue")


def is_congruence(node: Node) -> bool:
    if node.op != "relation" or len(node.args) != 3 or node.args[1] != "==":
        return False
    right: Node = node.args[2]
    return right.op == "call" and right.args[0] == "mod"
