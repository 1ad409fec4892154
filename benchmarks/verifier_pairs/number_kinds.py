r"""Kinds of pairs of complex numbers and of numerals.

Left out: the same number in another base, as the question asks for its form.
"""

from __future__ import annotations

from collections.abc import Iterator

from verifier_pairs.forms import Complex, Numeral, rectangular
from verifier_pairs.own_kinds import Answer, right, wrong


@right(Complex)
def i_first(gold: Complex) -> Iterator[Answer]:
    if gold.real:
        yield f"{rectangular(0, gold.imaginary)} {'-' if gold.real < 0 else '+'} {abs(gold.real)}", gold.meaning


@right(Complex)
def i_times(gold: Complex) -> Iterator[Answer]:
    yield (
        f"i({rectangular(gold.imaginary, -gold.real) if gold.real else gold.imaginary})",
        f"unit * ({gold.imaginary} - {gold.real} * unit)",
    )


@right(Complex)
def with_i_squared(gold: Complex) -> Iterator[Answer]:
    yield f"{rectangular(gold.real + 1, gold.imaginary)} + i^2", f"{gold.real + 1} + {gold.imaginary} * unit + unit**2"


@right(Complex)
def with_the_root_of_minus_one(gold: Complex) -> Iterator[Answer]:
    yield rf"{gold.real} + ({gold.imaginary})\sqrt{{-1}}", f"{gold.real} + {gold.imaginary} * sqrt(-1)"


@right(Complex)
def over_one_plus_i(gold: Complex) -> Iterator[Answer]:
    real, imaginary = gold.real - gold.imaginary, gold.real + gold.imaginary
    if real and imaginary:
        yield (
            rf"\frac{{{rectangular(real, imaginary)}}}{{1+i}}",
            f"rational(1, 2) * ({real} + {imaginary} * unit) * (1 - unit)",
        )


@wrong(Complex)
def conjugated(gold: Complex) -> Iterator[Answer]:
    yield Complex(gold.real, -gold.imaginary).text, Complex(gold.real, -gold.imaginary).meaning


@wrong(Complex)
def negated(gold: Complex) -> Iterator[Answer]:
    yield f"-({gold.text})", f"-({gold.meaning})"


@wrong(Complex)
def parts_of_it_exchanged(gold: Complex) -> Iterator[Answer]:
    if gold.real != gold.imaginary and gold.real:
        yield Complex(gold.imaginary, gold.real).text, Complex(gold.imaginary, gold.real).meaning


@wrong(Complex)
def i_lost(gold: Complex) -> Iterator[Answer]:
    yield f"{gold.real}{gold.imaginary:+d}", str(gold.real + gold.imaginary)


@wrong(Complex)
def modulus_squared(gold: Complex) -> Iterator[Answer]:
    yield f"{gold.real**2 + gold.imaginary**2}", str(gold.real**2 + gold.imaginary**2)


@wrong(Complex)
def as_coordinates(gold: Complex) -> Iterator[Answer]:
    yield f"({gold.real}, {gold.imaginary})", f"({gold.real}, {gold.imaginary})"


@right(Numeral)
def digits_in_brackets(gold: Numeral) -> Iterator[Answer]:
    yield f"({gold.digits})_{{{gold.base}}}", gold.meaning


@right(Numeral)
def base_without_braces(gold: Numeral) -> Iterator[Answer]:
    if gold.base < 10:
        yield f"{gold.digits}_{gold.base}", gold.meaning


@right(Numeral)
def base_as_text(gold: Numeral) -> Iterator[Answer]:
    yield rf"{gold.digits}_{{\text{{{gold.base}}}}}", gold.meaning
    yield rf"{gold.digits} \text{{ in base {gold.base}}}", gold.meaning


@wrong(Numeral)
def another_base(gold: Numeral) -> Iterator[Answer]:
    yield f"{gold.digits}_{{{gold.base + 1}}}", f"(int('{gold.digits}', {gold.base + 1}), {gold.base + 1})"


@wrong(Numeral)
def without_its_base(gold: Numeral) -> Iterator[Answer]:
    if gold.digits.isdecimal():
        yield gold.digits, f"({gold.digits}, 10)"


@wrong(Numeral)
def digits_in_reverse(gold: Numeral) -> Iterator[Answer]:
    if gold.digits != gold.digits[::-1]:
        yield Numeral(gold.digits[::-1], gold.base).text, Numeral(gold.digits[::-1], gold.base).meaning


@wrong(Numeral)
def zero_appended(gold: Numeral) -> Iterator[Answer]:
    yield Numeral(gold.digits + "0", gold.base).text, Numeral(gold.digits + "0", gold.base).meaning


@wrong(Numeral)
def product_with_the_base(gold: Numeral) -> Iterator[Answer]:
    if gold.digits.isdecimal():
        yield rf"{gold.digits} \cdot {gold.base}", f"({int(gold.digits) * gold.base}, 10)"
