r"""Other writings of a gold. Each takes what it can, and returns the writing or None; for a closed number also the same
as an expression of Python, from which an independent evaluation takes its value."""

from __future__ import annotations

import re
from collections.abc import Callable
from fractions import Fraction

from verifier_pairs.golds import Gold, parts

Made = str | tuple[str, str] | None
Maker = Callable[[Gold], Made]
WRITINGS: dict[str, tuple[tuple[str, ...], Maker]] = {}
_NUMBERS = ("integer", "fraction", "decimal")


def of(*looks: str) -> Callable[[Maker], Maker]:
    def add(maker: Maker) -> Maker:
        WRITINGS[maker.__name__.replace("_", " ").strip()] = (looks, maker)
        return maker

    return add


def value_of(gold: Gold) -> Fraction:
    assert gold.value is not None
    return gold.value


def whole(gold: Gold) -> int:
    return int(value_of(gold))


def ratio(gold: Gold) -> tuple[int, int]:
    return value_of(gold).numerator, value_of(gold).denominator


# Integers


@of("integer")
def plus_sign(gold: Gold) -> Made:
    return (f"+{whole(gold)}", str(whole(gold))) if whole(gold) > 0 else None


@of("integer")
def comma_between_groups(gold: Gold) -> Made:
    return f"{whole(gold):,}" if abs(whole(gold)) >= 1000 else None


@of("integer")
def latex_comma_between_groups(gold: Gold) -> Made:
    return f"{whole(gold):,}".replace(",", "{,}") if abs(whole(gold)) >= 1000 else None


@of("integer")
def thin_space_between_groups(gold: Gold) -> Made:
    return f"{whole(gold):,}".replace(",", r"\,") if abs(whole(gold)) >= 1000 else None


@of("integer")
def space_between_groups(gold: Gold) -> Made:
    return f"{whole(gold):,}".replace(",", " ") if abs(whole(gold)) >= 1000 else None


@of("integer")
def zero_behind_the_point(gold: Gold) -> Made:
    return f"{whole(gold)}.0", f"Rational({whole(gold)})"


@of("integer")
def cancelled_fraction(gold: Gold) -> Made:
    return rf"\frac{{{whole(gold) * 6}}}{{6}}", f"Rational({whole(gold) * 6}, 6)"


@of("integer")
def sum_of_two(gold: Gold) -> Made:
    first = whole(gold) // 3 - 5
    second = whole(gold) - first
    return f"{first}{second:+d}", f"({first}) + ({second})"


@of("integer")
def explicit_product(gold: Gold) -> Made:
    factor = next((d for d in (2, 3, 5, 7) if whole(gold) % d == 0), 1)
    return rf"{factor} \cdot {whole(gold) // factor}" if whole(gold) > 0 else None


@of("integer")
def product_of_brackets(gold: Gold) -> Made:
    factor = next((d for d in (2, 3, 5, 7) if whole(gold) % d == 0), 1)
    return f"{factor}({whole(gold) // factor})", f"{factor} * ({whole(gold) // factor})"


@of("integer")
def root_of_the_square(gold: Gold) -> Made:
    sign = "-" if whole(gold) < 0 else ""
    return rf"{sign}\sqrt{{{whole(gold) ** 2}}}", f"{sign}sqrt({whole(gold) ** 2})"


@of("integer")
def absolute_value(gold: Gold) -> Made:
    return (f"|{-whole(gold)}|", f"Abs({-whole(gold)})") if whole(gold) >= 0 else None


@of("integer")
def scientific_notation(gold: Gold) -> Made:
    digits = str(abs(whole(gold)))
    if whole(gold) == 0 or len(digits) > 15:
        return None
    mantissa = f"{digits[0]}.{digits[1:] or '0'}"
    sign = "-" if whole(gold) < 0 else ""
    exponent = len(digits) - 1
    return rf"{sign}{mantissa} \times 10^{{{exponent}}}", f"{sign}Rational('{mantissa}') * 10**{exponent}"


@of("integer")
def binomial(gold: Gold) -> Made:
    return (rf"\binom{{{whole(gold)}}}{{1}}", f"binomial({whole(gold)}, 1)") if 0 < whole(gold) < 5000 else None


@of("integer")
def logarithm(gold: Gold) -> Made:
    return (rf"\log_2 2^{{{whole(gold)}}}", f"log(2**{whole(gold)}, 2)") if 0 < whole(gold) < 60 else None


@of("integer")
def difference_of_powers(gold: Gold) -> Made:
    n = whole(gold)
    return f"({n + 1})^2 - ({n})^2 - {n + 1}" if n >= 0 else None


@of("integer")
def what_it_counts(gold: Gold) -> Made:
    return rf"{gold.text} \text{{ students}}"


@of("integer")
def degree_sign(gold: Gold) -> Made:
    return rf"{gold.text}^\circ"


@of("integer")
def base_ten(gold: Gold) -> Made:
    return f"{whole(gold)}_{{10}}" if whole(gold) >= 0 else None


@of("integer")
def real_part(gold: Gold) -> Made:
    return rf"{whole(gold) + 1} + i^2", f"{whole(gold) + 1} + I**2"


@of("integer")
def trigonometric(gold: Gold) -> Made:
    return rf"{2 * whole(gold)} \sin 30^\circ", f"{2 * whole(gold)} * sin(pi / 6)"


# Fractions and decimals


@of("fraction")
def display_fraction(gold: Gold) -> Made:
    top, bottom = ratio(gold)
    return rf"\dfrac{{{top}}}{{{bottom}}}", f"Rational({top}, {bottom})"


@of("fraction")
def slash(gold: Gold) -> Made:
    top, bottom = ratio(gold)
    return f"{top}/{bottom}", f"Rational({top}, {bottom})"


@of("fraction")
def expanded_fraction(gold: Gold) -> Made:
    top, bottom = ratio(gold)
    return rf"\frac{{{7 * top}}}{{{7 * bottom}}}", f"Rational({7 * top}, {7 * bottom})"


@of("fraction")
def division_sign(gold: Gold) -> Made:
    top, bottom = ratio(gold)
    return (rf"{top} \div {bottom}", f"Rational({top}) / {bottom}") if top > 0 else None


@of("fraction")
def negative_power(gold: Gold) -> Made:
    top, bottom = ratio(gold)
    return rf"{top} \cdot {bottom}^{{-1}}", f"{top} * Rational({bottom})**-1"


@of("fraction")
def mixed_number(gold: Gold) -> Made:
    top, bottom = ratio(gold)
    if abs(top) < bottom or bottom == 1:
        return None
    sign, (integer, rest) = "-" if top < 0 else "", divmod(abs(top), bottom)
    return rf"{sign}{integer}\frac{{{rest}}}{{{bottom}}}", f"{sign}({integer} + Rational({rest}, {bottom}))"


@of("fraction")
def sum_of_fractions(gold: Gold) -> Made:
    top, bottom = ratio(gold)
    return (
        rf"\frac{{{top - 1}}}{{{bottom}}}+\frac{{1}}{{{bottom}}}",
        f"Rational({top - 1}, {bottom}) + Rational(1, {bottom})",
    )


@of("fraction")
def terminating_decimal(gold: Gold) -> Made:
    bottom = value_of(gold).denominator
    for prime in (2, 5):
        while bottom % prime == 0:
            bottom //= prime
    if bottom > 1 or value_of(gold).denominator > 10**6:
        return None
    places = next(n for n in range(40) if (value_of(gold) * 10**n).denominator == 1)
    return _decimal(value_of(gold), places), f"Rational('{_decimal(value_of(gold), places)}')"


def _decimal(value: Fraction, places: int) -> str:
    digits = str(abs(int(value * 10**places))).rjust(places + 1, "0")
    return (
        ("-" if value < 0 else "")
        + digits[: len(digits) - places]
        + ("." + digits[len(digits) - places :]) * bool(places)
    )


@of("fraction")
def repeating_decimal(gold: Gold) -> Made:
    value = abs(value_of(gold))
    bottom = value.denominator
    if bottom % 2 == 0 or bottom % 5 == 0 or bottom == 1:
        return None
    period = next((n for n in range(1, 13) if (10**n - 1) % bottom == 0), None)
    if period is None:
        return None
    integer = int(value)
    repeated = str(int((value - integer) * (10**period - 1))).rjust(period, "0")
    sign = "-" if value_of(gold) < 0 else ""
    exact = f"{sign}({integer} + Rational({int(repeated)}, {10**period - 1}))"
    return rf"{sign}{integer}.\overline{{{repeated}}}", exact


@of("fraction")
def seven_decimals(gold: Gold) -> Made:
    rounded = round(value_of(gold), 8)
    if rounded == value_of(gold) or abs(value_of(gold)) < 1:
        return None
    return _decimal(rounded, 8)


@of("fraction", "decimal")
def percent(gold: Gold) -> Made:
    value = value_of(gold) * 100
    if value.denominator != 1:
        return None
    return rf"{int(value)}\%", f"Rational({int(value)}, 100)"


@of("decimal")
def as_a_fraction(gold: Gold) -> Made:
    top, bottom = ratio(gold)
    return rf"\frac{{{top}}}{{{bottom}}}", f"Rational({top}, {bottom})"


@of("decimal")
def another_zero(gold: Gold) -> Made:
    return gold.text + "0", f"Rational('{gold.text.replace(',', '')}0')"


# All numbers and polynomials


@of(*_NUMBERS)
def twice_minus(gold: Gold) -> Made:
    value = value_of(gold)
    return f"-(-({gold.text}))", f"-(-(Rational({value.numerator}, {value.denominator})))"


@of(*_NUMBERS, "polynomial")
def named(gold: Gold) -> Made:
    name = next(letter for letter in "tuvwSTQ" if letter not in gold.text)
    return f"{name} = {gold.text}"


@of(*_NUMBERS, "tuple", "interval", "polynomial", "list", "union", "other")
def full_stop(gold: Gold) -> Made:
    return gold.text + "."


@of(*_NUMBERS, "tuple", "interval", "polynomial", "union", "other")
def spaces(gold: Gold) -> Made:
    return " " + re.sub(r"(?<=[-+,=])(?![0-9]{3}(?![0-9]))", " ", gold.text) + r" \;"


@of("polynomial")
def terms_in_reverse(gold: Gold) -> Made:
    terms = parts(gold.text.replace(" ", ""), "+-")
    if len(terms) < 2:
        return None
    turned = [term if term[0] in "+-" else f"+{term}" for term in reversed(terms)]
    return "".join(turned).removeprefix("+")


@of("polynomial")
def brackets_of_latex(gold: Gold) -> Made:
    return gold.text.replace("(", r"\left(").replace(")", r"\right)") if "(" in gold.text else None


@of("polynomial")
def dots_behind_coefficients(gold: Gold) -> Made:
    dotted = re.sub(r"(?<![\^{0-9])([0-9]+)(?=[a-zA-Z])", r"\1\\cdot ", gold.text)
    return dotted if dotted != gold.text else None


@of("polynomial")
def braces_of_exponents(gold: Gold) -> Made:
    braced = re.sub(r"\^([0-9])(?![0-9])", r"^{\1}", gold.text)
    return braced if braced != gold.text else None


@of("polynomial")
def half_of_twice(gold: Gold) -> Made:
    return rf"\frac{{2({gold.text})}}{{2}}"


@of("polynomial")
def zero_added(gold: Gold) -> Made:
    return f"({gold.text}) + 0"


# Structures


@of("tuple")
def angle_brackets(gold: Gold) -> Made:
    inside = gold.text.replace(r"\left", "").replace(r"\right", "").strip()[1:-1]
    return rf"\langle {inside} \rangle"


@of("tuple", "interval")
def large_brackets(gold: Gold) -> Made:
    plain = gold.text.replace(r"\left", "").replace(r"\right", "").strip()
    return rf"\left{plain[0]} {plain[1:-1]} \right{plain[-1]}"


@of("tuple")
def named_point(gold: Gold) -> Made:
    return f"(x,y) = {gold.text}" if len(parts(gold.text.strip("()"), ",")) == 2 and r"\left" not in gold.text else None


@of("interval")
def condition(gold: Gold) -> Made:
    plain = gold.text.replace(r"\left", "").replace(r"\right", "").replace(" ", "")
    start, end = parts(plain[1:-1], ",")
    low, high = ("<" if plain[0] == "(" else r"\le "), ("<" if plain[-1] == ")" else r"\le ")
    end = end.lstrip(",")
    if "infty" in start + end:
        if "infty" in start and "infty" in end:
            return None
        return f"x {high} {end}" if "infty" in start else f"x {low.replace('<', '>').replace('le', 'ge')} {start}"
    if plain[0] == "(" and plain[-1] == ")":
        return None  # it may be a point
    return f"{start} {low} x {high} {end}"


@of("interval", "union")
def membership(gold: Gold) -> Made:
    return rf"x \in {gold.text}"


@of("union")
def parts_in_reverse(gold: Gold) -> Made:
    return r" \cup ".join(reversed([part.strip() for part in gold.text.split(r"\cup")]))


@of("list")
def other_order(gold: Gold) -> Made:
    return ", ".join(reversed([part.strip() for part in gold.text.split(",")]))


@of("list")
def braces_around(gold: Gold) -> Made:
    return rf"\{{{gold.text}\}}" if len(set(gold.text.split(","))) == len(gold.text.split(",")) else None


@of("list")
def and_before_the_last(gold: Gold) -> Made:
    *others, last = gold.text.split(",")
    return ", ".join(others) + rf" \text{{ and }} {last.strip()}"


@of("word")
def text_command(gold: Gold) -> Made:
    return rf"\text{{{_word(gold)}}}"


@of("word")
def bold(gold: Gold) -> Made:
    return rf"\textbf{{{_word(gold)}}}"


@of("word")
def capitals(gold: Gold) -> Made:
    return rf"\text{{{_word(gold).upper()}}}"


def _word(gold: Gold) -> str:
    return gold.text.replace(r"\text", "").strip("{} ")


# Everything else


@of("other", "polynomial")
def root_as_a_power(gold: Gold) -> Made:
    changed = re.sub(r"\\sqrt\{([0-9a-z]+)\}", r"(\1)^{1/2}", gold.text)
    return changed if changed != gold.text else None


@of("other")
def root_without_braces(gold: Gold) -> Made:
    changed = re.sub(r"\\sqrt\{([0-9])\}", r"\\sqrt\1", gold.text)
    return changed if changed != gold.text else None


@of("other")
def root_in_plain_text(gold: Gold) -> Made:
    changed = re.sub(r"\\sqrt\{([0-9]+)\}", r"sqrt(\1)", gold.text)
    return changed if changed != gold.text else None


@of("other")
def pi_in_plain_text(gold: Gold) -> Made:
    return gold.text.replace(r"\pi", " pi ") if r"\pi" in gold.text else None


@of("other")
def pi_in_the_numerator(gold: Gold) -> Made:
    match = re.fullmatch(r"(-?)\\frac\{([0-9]+)\}\{([0-9]+)\}\s*\\pi", gold.text)
    return rf"{match[1]}\frac{{{match[2]}\pi}}{{{match[3]}}}" if match else None


@of("other")
def imaginary_part_first(gold: Gold) -> Made:
    match = re.fullmatch(r"(-?[0-9]+)([-+])([0-9]*i)", gold.text)
    return f"{match[2].removeprefix('+')}{match[3]}{int(match[1]):+d}" if match else None


@of("other")
def numeral_in_brackets(gold: Gold) -> Made:
    match = re.fullmatch(r"([0-9]+)_\{?([0-9]+)\}?", gold.text)
    return f"({match[1]})_{{{match[2]}}}" if match else None


@of("other")
def times_one(gold: Gold) -> Made:
    refused = r"[=<>,;\[]|\\(?:approx|le|ge|in|text|begin|cup|pm|circ|%)|%|_"
    return rf"1 \cdot \left({gold.text}\right)" if not re.search(refused, gold.text) else None
