r"""Kinds of pairs of quantities with units, also in two units at once.

Factors of conversion are exact by definition. Left out is the number alone, as people settle differently whether a unit
may be left out.
"""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction

from verifier_pairs.forms import UNITS, Compound, Quantity, measured, quantity
from verifier_pairs.own_kinds import Answer, decimal, exact, number, right, wrong


def converted(gold: Quantity) -> list[tuple[Fraction, str]]:
    """The quantity in each other unit in which it has at most four decimals."""
    dimension, factor, _ = UNITS[gold.unit]
    others = [(gold.value * factor / size, unit) for unit, (kind, size, _) in UNITS.items() if kind == dimension]
    return [(value, unit) for value, unit in others if unit != gold.unit and decimal(value, 4) and value >= 1]


@right(Quantity)
def in_another_unit(gold: Quantity) -> Iterator[Answer]:
    for value, unit in converted(gold)[:2]:
        yield quantity(value, unit), measured(value, unit)


@right(Quantity)
def unit_as_a_word(gold: Quantity) -> Iterator[Answer]:
    if UNITS[gold.unit][2] != gold.unit:
        yield rf"{number(gold.value)} \text{{ {UNITS[gold.unit][2]}}}", gold.meaning


@right(Quantity)
def upright_unit(gold: Quantity) -> Iterator[Answer]:
    if gold.unit.islower() and gold.unit.isalpha():
        yield rf"{number(gold.value)}\,\mathrm{{{gold.unit}}}", gold.meaning


@right(Quantity)
def unit_in_plain_text(gold: Quantity) -> Iterator[Answer]:
    yield f"{number(gold.value)} {gold.unit}", gold.meaning


@right(Quantity)
def named_quantity(gold: Quantity) -> Iterator[Answer]:
    yield f"d = {gold.text}", gold.meaning


@wrong(Quantity)
def same_number_of_another_unit(gold: Quantity) -> Iterator[Answer]:
    dimension, factor, _ = UNITS[gold.unit]
    others = [unit for unit, (kind, size, _) in UNITS.items() if kind == dimension and size != factor]
    for unit in others[:2]:
        yield quantity(gold.value, unit), measured(gold.value, unit)


@wrong(Quantity)
def unit_of_another_dimension(gold: Quantity) -> Iterator[Answer]:
    for unit in ("s", "kg", "m", "km/h"):
        if UNITS[unit][0] != UNITS[gold.unit][0] and unit != gold.unit.partition("^")[0]:
            yield quantity(gold.value, unit), measured(gold.value, unit)


@wrong(Quantity)
def percent_for_the_unit(gold: Quantity) -> Iterator[Answer]:
    yield rf"{number(gold.value)}\%", f"({exact(gold.value / 100)}, 'number')"


@wrong(Quantity)
def degrees_for_the_unit(gold: Quantity) -> Iterator[Answer]:
    yield rf"{number(gold.value)}^\circ", f"({exact(gold.value / 180)} * pi, 'number')"


@wrong(Quantity)
def money_for_the_unit(gold: Quantity) -> Iterator[Answer]:
    yield rf"\${number(gold.value)}", f"({exact(gold.value * 100)}, 'cents')"


@wrong(Quantity)
def square_of_the_unit(gold: Quantity) -> Iterator[Answer]:
    if UNITS[gold.unit][0] == "length" and len(gold.unit) <= 2:
        yield rf"{gold.text}^2", f"({exact(gold.value * UNITS[gold.unit][1] ** 2)}, 'area')"


@wrong(Quantity)
def power_of_the_unit_lost(gold: Quantity) -> Iterator[Answer]:
    if "^" in gold.unit:
        unit = gold.unit.partition("^")[0]
        yield quantity(gold.value, unit), measured(gold.value, unit)


@wrong(Quantity)
def other_number_of_the_unit(gold: Quantity) -> Iterator[Answer]:
    value = gold.value + Fraction(1, 2)
    yield quantity(value, gold.unit), measured(value, gold.unit)


@wrong(Quantity)
def converted_with_ten_times_the_factor(gold: Quantity) -> Iterator[Answer]:
    for value, unit in converted(gold)[:1]:
        yield quantity(10 * value, unit), measured(10 * value, unit)


@wrong(Quantity)
def minus_the_quantity(gold: Quantity) -> Iterator[Answer]:
    yield f"-{gold.text}", measured(-gold.value, gold.unit)


@right(Compound)
def in_the_smaller_unit(gold: Compound) -> Iterator[Answer]:
    yield rf"{number(gold.in_parts)} \text{{ {UNITS[gold.part][2]}}}", gold.meaning


@right(Compound)
def in_the_larger_unit(gold: Compound) -> Iterator[Answer]:
    value = gold.in_parts * UNITS[gold.part][1] / UNITS[gold.unit][1]
    yield rf"{number(value)} \text{{ {UNITS[gold.unit][2]}}}", measured(value, gold.unit)


@right(Compound)
def both_joined_by_and(gold: Compound) -> Iterator[Answer]:
    large, small = UNITS[gold.unit][2], UNITS[gold.part][2]
    yield rf"{gold.large} \text{{ {large} and }} {gold.small} \text{{ {small}}}", gold.meaning


@wrong(Compound)
def smaller_part_changed(gold: Compound) -> Iterator[Answer]:
    changed = Compound(gold.large, gold.unit, gold.small + 1, gold.part)
    yield changed.text, changed.meaning


@wrong(Compound)
def smaller_part_lost(gold: Compound) -> Iterator[Answer]:
    yield rf"{gold.large} \text{{ {UNITS[gold.unit][2]}}}", measured(Fraction(gold.large), gold.unit)


@wrong(Compound)
def larger_part_lost(gold: Compound) -> Iterator[Answer]:
    yield rf"{gold.small} \text{{ {UNITS[gold.part][2]}}}", measured(Fraction(gold.small), gold.part)


@wrong(Compound)
def parts_exchanged(gold: Compound) -> Iterator[Answer]:
    changed = Compound(gold.small, gold.unit, gold.large, gold.part)
    yield changed.text, changed.meaning


@wrong(Compound)
def read_as_a_decimal(gold: Compound) -> Iterator[Answer]:
    value = Fraction(f"{gold.large}.{gold.small}")
    yield rf"{gold.large}.{gold.small} \text{{ {UNITS[gold.unit][2]}}}", measured(value, gold.unit)
