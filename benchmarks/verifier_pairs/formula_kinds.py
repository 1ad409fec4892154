r"""Kinds of pairs of formulas: products of several letters, and both cases of one letter."""

from __future__ import annotations

from collections.abc import Iterator

from verifier_pairs.formula_forms import Difference, Product, powers, product, product_meaning
from verifier_pairs.own_kinds import Answer, right, wrong


def means(gold: Product, **changed: object) -> Answer:
    """A product with another coefficient, numerator or denominator."""
    given = {"coefficient": gold.coefficient, "above": gold.above, "below": gold.below, **changed}
    return product(**given), product_meaning(**given)  # type: ignore[arg-type]


@right(Product)
def letters_in_reverse(gold: Product) -> Iterator[Answer]:
    yield means(gold, above=gold.above[::-1], below=gold.below[::-1])


@right(Product)
def letters_rotated(gold: Product) -> Iterator[Answer]:
    if len(gold.above) > 2:
        yield means(gold, above=(*gold.above[1:], gold.above[0]))


@right(Product)
def dots_between_letters(gold: Product) -> Iterator[Answer]:
    if gold.coefficient == 1 and not gold.below:
        yield r" \cdot ".join(powers((factor,)) for factor in gold.above), gold.meaning


@right(Product)
def negative_exponents(gold: Product) -> Iterator[Answer]:
    if gold.below:
        below = "".join(f"{name}^{{-{power}}}" for name, power in gold.below)
        yield f"{product(gold.coefficient, gold.above)}{below}", gold.meaning


@right(Product)
def fraction_times_the_rest(gold: Product) -> Iterator[Answer]:
    if gold.below and gold.coefficient == 1 and len(gold.above) > 1:
        first = product(gold.coefficient, gold.above[:1], gold.below)
        yield f"{first} {powers(gold.above[1:])}", gold.meaning


@right(Product)
def expanded_by_two(gold: Product) -> Iterator[Answer]:
    yield rf"\frac{{2({gold.text})}}{{2}}", gold.meaning


def cased(letter: str) -> str:
    return letter.swapcase() if len(letter) == 1 else letter


@wrong(Product)
def case_of_one_letter(gold: Product) -> Iterator[Answer]:
    for place, (name, power) in enumerate(gold.above):
        if cased(name) != name and not {"e", "i"} & {name, cased(name)}:
            yield means(gold, above=(*gold.above[:place], (cased(name), power), *gold.above[place + 1 :]))


@wrong(Product)
def case_below(gold: Product) -> Iterator[Answer]:
    if gold.below:
        yield means(gold, below=((cased(gold.below[0][0]), gold.below[0][1]), *gold.below[1:]))


@wrong(Product)
def first_letter_of_it_lost(gold: Product) -> Iterator[Answer]:
    if len(gold.above) > 1:
        yield means(gold, above=gold.above[1:])


@wrong(Product)
def last_letter_of_it_lost(gold: Product) -> Iterator[Answer]:
    if len(gold.above) > 1:
        yield means(gold, above=gold.above[:-1])


@wrong(Product)
def last_letter_squared(gold: Product) -> Iterator[Answer]:
    name, power = gold.above[-1]
    yield means(gold, above=(*gold.above[:-1], (name, power + 1)))


@wrong(Product)
def exponent_below_raised(gold: Product) -> Iterator[Answer]:
    if gold.below:
        yield means(gold, below=((gold.below[0][0], gold.below[0][1] + 1), *gold.below[1:]))


@wrong(Product)
def letters_above_and_below_exchanged(gold: Product) -> Iterator[Answer]:
    if gold.below:
        (first, power), (second, other) = gold.above[0], gold.below[0]
        yield means(gold, above=((second, power), *gold.above[1:]), below=((first, other), *gold.below[1:]))


@wrong(Product)
def upside_down_product(gold: Product) -> Iterator[Answer]:
    if gold.below:
        yield means(gold, above=gold.below, below=gold.above)


@wrong(Product)
def minus_the_product(gold: Product) -> Iterator[Answer]:
    yield means(gold, coefficient=-gold.coefficient)


@wrong(Product)
def twice_the_product(gold: Product) -> Iterator[Answer]:
    yield means(gold, coefficient=2 * gold.coefficient)


@wrong(Product)
def sum_of_the_letters(gold: Product) -> Iterator[Answer]:
    if not gold.below and len(gold.above) > 1 and gold.coefficient == 1:
        names = [powers((factor,)) for factor in gold.above]
        yield "+".join(names), " + ".join(f"{name}**{power}" for name, power in gold.above)


@right(Difference)
def difference_factored(gold: Difference) -> Iterator[Answer]:
    large, small = gold.large, gold.large.lower()
    if gold.power == 2:
        meaning = gold.means(f"({large} - {small}) * ({large} + {small})")
        yield gold.frame.replace("(@)", f"({large}-{small})({large}+{small})"), meaning


@right(Difference)
def smaller_first(gold: Difference) -> Iterator[Answer]:
    yield gold.frame.replace("@", f"-{gold.of(gold.large.lower())}+{gold.of(gold.large)}"), gold.meaning


@wrong(Difference)
def cases_exchanged(gold: Difference) -> Iterator[Answer]:
    large, small = gold.large, gold.large.lower()
    meaning = gold.means(f"{small}**{gold.power} - {large}**{gold.power}")
    yield gold.frame.replace("@", f"{gold.of(small)}-{gold.of(large)}"), meaning


@wrong(Difference)
def both_of_one_case(gold: Difference) -> Iterator[Answer]:
    for letter in (gold.large, gold.large.lower()):
        yield gold.frame.replace("@", f"{gold.of(letter)}-{gold.of(letter)}"), gold.means("0")


@wrong(Difference)
def sum_for_difference(gold: Difference) -> Iterator[Answer]:
    yield gold.text.replace("-", "+"), gold.means(f"{gold.large}**{gold.power} + {gold.large.lower()}**{gold.power}")


@wrong(Difference)
def smaller_lost(gold: Difference) -> Iterator[Answer]:
    yield gold.frame.replace("@", gold.of(gold.large)), gold.means(f"{gold.large}**{gold.power}")
