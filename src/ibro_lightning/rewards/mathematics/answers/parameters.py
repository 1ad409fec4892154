"""Names that mean nothing: constants of integration, the argument of a function, whole numbers that count solutions."""

from __future__ import annotations

from ibro_lightning.rewards.mathematics.answers.node import Node, is_term, mapped, symbols
from ibro_lightning.rewards.mathematics.answers.rationals import Uncertain, exact
from ibro_lightning.rewards.mathematics.answers.rules import Judgement, Rules, no, yes
from ibro_lightning.rewards.mathematics.answers.same_terms import same_terms
from ibro_lightning.rewards.mathematics.answers.sampling import points
from ibro_lightning.rewards.mathematics.answers.values import Evaluation, agree
from ibro_lightning.rewards.mathematics.answers.vocabulary import words

_CONSTANTS = words("C c K k C_1 c_1 C_0 c_0")
_COUNTING = words("k n m l j")
_ENOUGH = 3


def with_names_of(gold: Node, answer: Node) -> Node:
    """``answer`` with the gold's names where names mean nothing."""
    names = _argument(gold), _argument(answer)
    if names == ("", ""):
        names = _constant(gold), _constant(answer)
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


def _constant(node: Node) -> str:
    """C of ``… + C``, if it occurs once."""
    terms = node.args if node.op == "add" else ()
    found = [str(part.args[0]) for part in terms if part.op == "symbol" and part.args[0] in _CONSTANTS]
    return found[0] if len(found) == 1 and found[0] not in symbols(_without(node, found[0])) else ""


def has_constant(node: Node) -> bool:
    return _constant(node) != ""


def _counter(gold: Node, answer: Node) -> tuple[str, str]:
    """k of ``π/2 + kπ`` and n of ``π/2 + nπ``, if they are all that differs."""
    ours, theirs = symbols(gold) - symbols(answer), symbols(answer) - symbols(gold)
    if len(ours) != 1 or len(theirs) != 1 or not ours | theirs <= _COUNTING:
        return "", ""
    if not (_is_angle(gold) and _is_angle(answer)):
        return "", ""
    return next(iter(ours)), next(iter(theirs))


def _is_angle(node: Node) -> bool:
    return node == Node("constant", ("pi",)) or node.op == "degree" or any(map(_is_angle, node.nodes()))


def _without(node: Node, name: str) -> Node:
    rest = [part for part in node.args if part != Node("symbol", (name,))]
    return rest[0] if len(rest) == 1 else Node("add", tuple(rest))


def same_antiderivatives(gold: Node, answer: Node) -> Judgement:
    """Whether two terms ``… + C`` differ by a constant."""
    name = _constant(gold)
    if not name or _constant(answer) != name or not (is_term(gold) and is_term(answer)):
        return no("another expression")
    difference = Node("add", (_without(gold, name), Node("neg", (_without(answer, name),))))
    found, scale = [], 0
    for assignment in points(difference):
        evaluation = Evaluation(assignment)
        try:
            value = evaluation(difference)
        except Uncertain:
            continue
        if evaluation.mp.im(value) == 0:
            found.append(value)
            scale = max(scale, evaluation.scale)
    same = len(found) >= _ENOUGH and all(agree(value - found[0], 0, scale) for value in found)
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
