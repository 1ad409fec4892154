"""Numbers with units, and angles."""

from __future__ import annotations

from fractions import Fraction

from ibro_lightning.rewards.mathematics.answers.names import of_equations
from ibro_lightning.rewards.mathematics.answers.node import Decimal, Node, is_term, mapped
from ibro_lightning.rewards.mathematics.answers.rationals import exact
from ibro_lightning.rewards.mathematics.answers.rules import Judgement, Rules, no
from ibro_lightning.rewards.mathematics.answers.same_terms import same_terms
from ibro_lightning.rewards.mathematics.answers.units import Dimension, is_known

_MAX_SPELLED_BITS = 600
_KELVIN: Dimension = (("kelvin", 1),)
_SCALES: dict[Dimension, tuple[Fraction, Fraction]] = {
    (("degreeC", 1),): (Fraction("273.15"), Fraction(1)),
    (("degreeF", 1),): (Fraction("273.15") - Fraction(160, 9), Fraction(5, 9)),
}


def as_angle(node: Node) -> Node:
    """Angles in words: radians as such, degrees with their sign."""
    if node.op == "quantity" and len(node.args) == 1:
        value, size, dimension = node.args[0]
        if dimension == ():
            return Node("call", ("radians", _times_size(value, size)))
        if dimension == (("degree", 1),):
            return Node("degree", (value,))
    return node


def same_quantities(gold: Node, answer: Node, rules: Rules) -> Judgement:
    """Whether two numbers, at least one with a unit, are the same amount; units as ``rules.units`` says."""
    if _is_percent(gold) != _is_percent(answer):
        return no("another unit")
    first, second = _measured(gold), _measured(answer)
    if first is None or second is None:
        return no("another form")
    (value, unit), (other, other_unit) = first, second
    if unit != other_unit and not all(part is None or is_known(part) for part in (unit, other_unit)):
        return no("an unknown word")
    if unit is not None and other_unit is not None:
        same = same_terms(value, other, rules) if unit == other_unit else no("another unit")
        if same.same or len(gold.args) != len(answer.args):
            return same
        plain = same_terms(_plain(gold), _plain(answer), rules) if len(gold.args) == 1 else same
        return plain if rules.units == "ignored" or not plain.same else no("another unit")
    if unit is not None and rules.units == "required":
        return no("no unit")
    if (len(gold.args) > 1 and gold.op == "quantity") or (len(answer.args) > 1 and answer.op == "quantity"):
        return no("no unit")
    return same_terms(_plain(gold), _plain(answer), rules)


def _is_percent(node: Node) -> bool:
    return _plain(node).op == "percent"


def without_units(gold: Node, answer: Node, rules: Rules) -> tuple[Node, Node] | None:
    """Two relations or sets of numbers in base units, or without units if one of them has none; None where their units
    differ, or are required and left out."""
    dimensions = [_dimensions(node) for node in (gold, answer)]
    if dimensions[0] and dimensions[1] and rules.units != "ignored":
        return (
            (mapped(gold, _in_base_units), mapped(answer, _in_base_units)) if dimensions[0] == dimensions[1] else None
        )
    if dimensions[0] and rules.units == "required":
        return None
    return mapped(gold, _plain), mapped(answer, _plain)


def _dimensions(node: Node) -> frozenset[Dimension]:
    if node.op == "quantity":
        return frozenset(dimension for _, _, dimension in node.args)
    return frozenset().union(*map(_dimensions, node.nodes()))


def _in_base_units(node: Node) -> Node:
    measured = _measured(node) if node.op == "quantity" else None
    return node if measured is None else measured[0]


def _plain(node: Node) -> Node:
    value: Node = node.args[0][0] if node.op == "quantity" else node
    return value


def _measured(node: Node) -> tuple[Node, Dimension | None] | None:
    """The value in base units with their dimension, None for no unit; or None for what is no number."""
    if node.op == "quantity":
        dimensions = {dimension for _, _, dimension in node.args}
        if len(dimensions) != 1:
            return None
        if len(node.args) == 1 and (scale := _SCALES.get(node.args[0][2])):
            return _in_kelvin(node.args[0][0], *scale), _KELVIN
        values = tuple(_times_size(value, unit) for value, unit, _ in node.args)
        return (values[0] if len(values) == 1 else Node("add", values)), dimensions.pop()
    if node.op == "degree":
        return node.args[0], (("degree", 1),)
    return (node, None) if is_term(node) else None


def _in_kelvin(value: Node, zero: Fraction, size: Fraction) -> Node:
    """A temperature, from the number of kelvins at 0 degrees and in one."""
    return Node("add", (_times_size(value, size), Node("number", (Decimal(zero),))))


def _times_size(value: Node, unit: Fraction) -> Node:
    return value if unit == 1 else Node("mul", (value, Node("number", (Decimal(unit),))))


def spelled(node: Node) -> str:
    """One spelling of a number however it was written, ``x = 1/2`` too; "" for anything else."""
    node = of_equations(node)
    if node.op == "quantity" and len(node.args) == 1 and is_known(node.args[0][2]):
        node = node.args[0][0]
    if node.op == "degree":
        node = node.args[0]
    value = exact(node) if is_term(node) and node.op != "percent" else None
    if value is None or max(value.numerator.bit_length(), value.denominator.bit_length()) > _MAX_SPELLED_BITS:
        return ""
    return str(value)
