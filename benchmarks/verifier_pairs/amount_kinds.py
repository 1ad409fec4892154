r"""Kinds of pairs of money, temperatures, angles, percents, times of day and ratios.

Left out is what people settle in different ways: ``25`` for ``25\%``, ``3:30`` for a time in the afternoon, ``6:20``
for the ratio 3:10.
"""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction

from verifier_pairs.forms import (
    Angle,
    Clock,
    Compound,
    Money,
    Percent,
    Ratio,
    Temperature,
    measured,
    proportion,
    quantity,
)
from verifier_pairs.own_kinds import Answer, decimal, exact, latex, number, right, wrong


@right(Money)
def as_a_word_behind(gold: Money) -> Iterator[Answer]:
    yield rf"{gold.amount} \text{{ dollars}}", gold.meaning


@right(Money)
def in_cents(gold: Money) -> Iterator[Answer]:
    yield rf"{gold.cents} \text{{ cents}}", gold.meaning


@right(Money)
def plain_dollar_sign(gold: Money) -> Iterator[Answer]:
    yield rf"\text{{\${gold.amount}}}", gold.meaning


@wrong(Money)
def cents_for_dollars(gold: Money) -> Iterator[Answer]:
    yield rf"{gold.amount} \text{{ cents}}", f"({exact(Fraction(gold.cents, 100))}, 'cents')"


@wrong(Money)
def another_currency(gold: Money) -> Iterator[Answer]:
    yield rf"{gold.amount} \text{{ euros}}", f"({exact(gold.cents)}, 'euro cents')"
    yield rf"€{gold.amount}", f"({exact(gold.cents)}, 'euro cents')"


@wrong(Money)
def cents_read_as_dollars(gold: Money) -> Iterator[Answer]:
    yield rf"\${gold.cents}", f"({exact(gold.cents * 100)}, 'cents')"


@wrong(Money)
def one_cent_more(gold: Money) -> Iterator[Answer]:
    yield Money(gold.cents + 1).text, Money(gold.cents + 1).meaning


@wrong(Money)
def percent_for_dollars(gold: Money) -> Iterator[Answer]:
    yield rf"{gold.amount}\%", f"({exact(Fraction(gold.cents, 10000))}, 'number')"


@right(Temperature)
def in_fahrenheit(gold: Temperature) -> Iterator[Answer]:
    value = gold.celsius * 9 / 5 + 32
    yield rf"{decimal(value)}^\circ\text{{F}}", fahrenheit(value)


@right(Temperature)
def in_kelvin(gold: Temperature) -> Iterator[Answer]:
    value = gold.celsius + Fraction("273.15")
    yield rf"{decimal(value)} \text{{ K}}", f"({exact(value)}, 'kelvin')"


def fahrenheit(value: Fraction) -> str:
    return f"(({exact(value)} - 32) * rational(5, 9) + rational(27315, 100), 'kelvin')"


@right(Temperature)
def degrees_celsius_as_words(gold: Temperature) -> Iterator[Answer]:
    yield rf"{number(gold.celsius)} \text{{ degrees Celsius}}", gold.meaning


@wrong(Temperature)
def fahrenheit_for_celsius(gold: Temperature) -> Iterator[Answer]:
    yield rf"{number(gold.celsius)}^\circ\text{{F}}", fahrenheit(gold.celsius)


@wrong(Temperature)
def kelvin_for_celsius(gold: Temperature) -> Iterator[Answer]:
    yield rf"{number(gold.celsius)} \text{{ K}}", f"({exact(gold.celsius)}, 'kelvin')"


@wrong(Temperature)
def one_degree_more(gold: Temperature) -> Iterator[Answer]:
    yield Temperature(gold.celsius + 1).text, Temperature(gold.celsius + 1).meaning


@wrong(Temperature)
def length_for_temperature(gold: Temperature) -> Iterator[Answer]:
    yield rf"{number(gold.celsius)} \text{{ cm}}", measured(gold.celsius, "cm")


@right(Angle)
def in_radians(gold: Angle) -> Iterator[Answer]:
    share = Fraction(gold.degrees, 180)
    bottom = f"{{{share.denominator}}}"
    top = r"\pi" if share.numerator == 1 else rf"{share.numerator}\pi"
    yield rf"\frac{{{top}}}{bottom} \text{{ radians}}", f"({share.numerator} * pi / {share.denominator}, 'number')"


@right(Angle)
def degrees_as_a_word(gold: Angle) -> Iterator[Answer]:
    yield rf"{gold.degrees} \text{{ degrees}}", gold.meaning


@wrong(Angle)
def radians_for_degrees(gold: Angle) -> Iterator[Answer]:
    yield rf"{gold.degrees} \text{{ radians}}", f"({gold.degrees}, 'number')"


@wrong(Angle)
def supplement(gold: Angle) -> Iterator[Answer]:
    if gold.degrees != 90:
        yield Angle(180 - gold.degrees).text, Angle(180 - gold.degrees).meaning


@wrong(Angle)
def percent_for_degrees(gold: Angle) -> Iterator[Answer]:
    yield rf"{gold.degrees}\%", f"({exact(Fraction(gold.degrees, 100))}, 'number')"


@wrong(Angle)
def length_for_an_angle(gold: Angle) -> Iterator[Answer]:
    yield rf"{gold.degrees} \text{{ cm}}", measured(Fraction(gold.degrees), "cm")


@wrong(Angle)
def temperature_for_an_angle(gold: Angle) -> Iterator[Answer]:
    yield Temperature(Fraction(gold.degrees)).text, Temperature(Fraction(gold.degrees)).meaning


@right(Percent)
def percent_as_a_word(gold: Percent) -> Iterator[Answer]:
    for word in ("percent", "per cent"):
        yield rf"{number(gold.value)} \text{{ {word}}}", gold.meaning


@right(Percent)
def space_before_the_sign(gold: Percent) -> Iterator[Answer]:
    yield rf"{number(gold.value)}\ \%", gold.meaning


@right(Percent)
def of_one(gold: Percent) -> Iterator[Answer]:
    yield latex(gold.value / 100), f"({exact(gold.value / 100)}, 'number')"


@wrong(Percent)
def unit_for_percent(gold: Percent) -> Iterator[Answer]:
    for unit in ("cm", "hours"):
        yield quantity(gold.value, unit), measured(gold.value, unit)


@wrong(Percent)
def degrees_for_percent(gold: Percent) -> Iterator[Answer]:
    yield rf"{number(gold.value)}^\circ", f"({exact(gold.value / 180)} * pi, 'number')"


@wrong(Percent)
def dollars_for_percent(gold: Percent) -> Iterator[Answer]:
    yield rf"\${number(gold.value)}", f"({exact(gold.value * 100)}, 'cents')"


@wrong(Percent)
def hundredth_with_the_sign(gold: Percent) -> Iterator[Answer]:
    yield rf"{number(gold.value / 100)}\%", f"({exact(gold.value / 10000)}, 'number')"


@wrong(Percent)
def rest_of_the_whole(gold: Percent) -> Iterator[Answer]:
    if gold.value != 50:
        yield rf"{number(100 - gold.value)}\%", f"({exact(1 - gold.value / 100)}, 'number')"


@right(Clock)
def with_24_hours(gold: Clock) -> Iterator[Answer]:
    if gold.minute >= 720 + 60:
        yield f"{gold.minute // 60}:{gold.minute % 60:02d}", gold.meaning


@right(Clock)
def small_letters(gold: Clock) -> Iterator[Answer]:
    yield rf"{gold.hands} \text{{ {gold.half[0].lower()}.m.}}", gold.meaning
    yield rf"\text{{{gold.hands} {gold.half.lower()}}}", gold.meaning


@wrong(Clock)
def other_half_of_the_day(gold: Clock) -> Iterator[Answer]:
    other = Clock((gold.minute + 720) % 1440)
    yield other.text, other.meaning


@wrong(Clock)
def one_minute_later(gold: Clock) -> Iterator[Answer]:
    other = Clock((gold.minute + 1) % 1440)
    yield other.text, other.meaning


@wrong(Clock)
def one_hour_later(gold: Clock) -> Iterator[Answer]:
    other = Clock((gold.minute + 60) % 1440)
    yield other.text, other.meaning


@wrong(Clock)
def duration_for_a_time(gold: Clock) -> Iterator[Answer]:
    hour, minute = gold.hands.split(":")
    if minute != "00":
        yield Compound(int(hour), "hours", int(minute), "min").text, measured(Fraction(gold.minute % 720), "min")


@right(Ratio)
def all_entries_times_three(gold: Ratio) -> Iterator[Answer]:
    entries = tuple(3 * entry for entry in gold.entries)
    yield Ratio(entries).text, proportion(entries)


@right(Ratio)
def with_to_between(gold: Ratio) -> Iterator[Answer]:
    yield r" \text{ to } ".join(map(str, gold.entries)), gold.meaning


@right(Ratio)
def spaces_at_the_colon(gold: Ratio) -> Iterator[Answer]:
    yield " : ".join(map(str, gold.entries)), gold.meaning


@wrong(Ratio)
def entries_in_reverse(gold: Ratio) -> Iterator[Answer]:
    entries = gold.entries[::-1]
    if proportion(entries) != gold.meaning:
        yield Ratio(entries).text, proportion(entries)


@wrong(Ratio)
def entry_raised(gold: Ratio) -> Iterator[Answer]:
    entries = (*gold.entries[:-1], gold.entries[-1] + 1)
    yield Ratio(entries).text, proportion(entries)


@wrong(Ratio)
def entry_more(gold: Ratio) -> Iterator[Answer]:
    entries = (*gold.entries, 1)
    yield Ratio(entries).text, proportion(entries)


@wrong(Ratio)
def one_entry_scaled(gold: Ratio) -> Iterator[Answer]:
    entries = (2 * gold.entries[0], *gold.entries[1:])
    yield Ratio(entries).text, proportion(entries)
