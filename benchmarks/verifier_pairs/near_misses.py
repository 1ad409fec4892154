r"""Near-misses of a gold: answers that look like it and are others. The authors of our verifier knew all of these kinds
when they wrote its rules, as they wrote both; a low error on them says little of other kinds, for which see
``own_golds.py``. Like the writings, each returns the answer or None, of closed numbers also as an expression of
Python."""

from __future__ import annotations

import re
from collections.abc import Callable

from verifier_pairs.golds import Gold, parts
from verifier_pairs.writings import Made, Maker, ratio, value_of, whole

NEAR_MISSES: dict[str, tuple[tuple[str, ...], Maker]] = {}
_NUMBERS = ("integer", "fraction", "decimal")


def of(*looks: str) -> Callable[[Maker], Maker]:
    def add(maker: Maker) -> Maker:
        NEAR_MISSES[maker.__name__.replace("_", " ").strip()] = (looks, maker)
        return maker

    return add


# Integers


@of("integer")
def one_more(gold: Gold) -> Made:
    return str(whole(gold) + 1), str(whole(gold) + 1)


@of("integer")
def ten_less(gold: Gold) -> Made:
    return str(whole(gold) - 10), str(whole(gold) - 10)


@of("integer")
def digits_exchanged(gold: Gold) -> Made:
    digits = str(whole(gold))
    for place in range(len(digits) - 1):
        if digits[place].isdigit() and digits[place] != digits[place + 1] and digits[place + 1] != "0":
            changed = digits[:place] + digits[place + 1] + digits[place] + digits[place + 2 :]
            return changed, str(int(changed))
    return None


@of("integer")
def digit_lost(gold: Gold) -> Made:
    digits = str(abs(whole(gold)))
    return (digits[:-1], digits[:-1]) if len(digits) > 1 and digits[:-1] != "0" else None


@of("integer")
def digit_twice(gold: Gold) -> Made:
    return (f"{whole(gold)}{str(whole(gold))[-1]}",) * 2 if whole(gold) else None


@of("integer")
def ten_times(gold: Gold) -> Made:
    return (f"{whole(gold)}0", f"{whole(gold)}0") if whole(gold) else None


@of("integer")
def a_little_more(gold: Gold) -> Made:
    return f"{whole(gold)}.01", f"Rational('{whole(gold)}.01')"


@of("integer")
def a_trace_more(gold: Gold) -> Made:
    return f"{whole(gold)}.0001", f"Rational('{whole(gold)}.0001')"


@of("integer")
def imaginary(gold: Gold) -> Made:
    return (f"{whole(gold)}i", f"{whole(gold)} * I") if whole(gold) else None


@of("integer")
def square_root(gold: Gold) -> Made:
    return (rf"\sqrt{{{whole(gold)}}}", f"sqrt({whole(gold)})") if whole(gold) > 1 else None


@of("integer")
def squared(gold: Gold) -> Made:
    return (f"({whole(gold)})^2", f"({whole(gold)})**2") if whole(gold) not in (0, 1) else None


@of("integer")
def factorial(gold: Gold) -> Made:
    return (f"{whole(gold)}!", f"factorial({whole(gold)})") if 2 < whole(gold) < 60 else None


@of("integer")
def reciprocal(gold: Gold) -> Made:
    return (rf"\frac{{1}}{{{whole(gold)}}}", f"Rational(1, {whole(gold)})") if whole(gold) not in (-1, 0, 1) else None


@of("integer")
def base_eight(gold: Gold) -> Made:
    digits = str(whole(gold))
    return f"{digits}_8" if digits.isdigit() and not set(digits) & set("89") and whole(gold) > 0 else None


@of("integer")
def million(gold: Gold) -> Made:
    return rf"{whole(gold)} \text{{ million}}" if whole(gold) else None


@of("integer")
def another_beside_it(gold: Gold) -> Made:
    return f"{whole(gold)}, {whole(gold) + 1}"


@of("integer")
def either_or(gold: Gold) -> Made:
    return rf"{whole(gold) - 2} \text{{ or }} {whole(gold)}"


@of("integer")
def from_zero_to_it(gold: Gold) -> Made:
    return f"[0, {whole(gold)}]" if whole(gold) > 0 else None


@of("integer")
def pair_of_it(gold: Gold) -> Made:
    return f"({whole(gold)}, {whole(gold)})"


@of("integer")
def product_read_as_a_sum(gold: Gold) -> Made:
    if whole(gold) < 6:
        return None
    return f"{whole(gold) - 2}(2)", f"{whole(gold) - 2} * 2"


@of("integer")
def logarithm_of_it(gold: Gold) -> Made:
    return (rf"\ln {whole(gold)}", f"log({whole(gold)})") if whole(gold) > 0 else None


@of("integer")
def sine_of_it(gold: Gold) -> Made:
    return (rf"\sin {whole(gold)}^\circ", f"sin({whole(gold)} * pi / 180)") if whole(gold) else None


# All numbers


@of(*_NUMBERS)
def other_sign(gold: Gold) -> Made:
    value = -value_of(gold)
    if value == 0:
        return None
    text = gold.text[1:] if gold.text.startswith("-") else f"-{gold.text}"
    return text, f"Rational({value.numerator}, {value.denominator})"


@of(*_NUMBERS)
def times_pi(gold: Gold) -> Made:
    value = value_of(gold)
    return (rf"{gold.text}\pi", f"Rational({value.numerator}, {value.denominator}) * pi") if value else None


@of(*_NUMBERS)
def times_a_symbol(gold: Gold) -> Made:
    return f"{gold.text}x" if value_of(gold) else None


@of(*_NUMBERS)
def less_than_it(gold: Gold) -> Made:
    return f"x < {gold.text}"


@of(*_NUMBERS)
def everything_but_it(gold: Gold) -> Made:
    return rf"x \ne {gold.text}"


@of(*_NUMBERS)
def plus_and_minus(gold: Gold) -> Made:
    return rf"\pm {gold.text.removeprefix('-')}" if value_of(gold) else None


# Fractions and decimals


@of("fraction")
def upside_down(gold: Gold) -> Made:
    top, bottom = ratio(gold)
    if abs(top) == bottom or top == 0:
        return None
    sign = "-" if top < 0 else ""
    return rf"{sign}\frac{{{bottom}}}{{{abs(top)}}}", f"{sign}Rational({bottom}, {abs(top)})"


@of("fraction")
def numerator_one_more(gold: Gold) -> Made:
    top, bottom = ratio(gold)
    return rf"\frac{{{top + 1}}}{{{bottom}}}", f"Rational({top + 1}, {bottom})"


@of("fraction")
def denominator_one_more(gold: Gold) -> Made:
    top, bottom = ratio(gold)
    return (rf"\frac{{{top}}}{{{bottom + 1}}}", f"Rational({top}, {bottom + 1})") if top else None


@of("fraction")
def numerator_alone(gold: Gold) -> Made:
    top, bottom = ratio(gold)
    return (str(top), str(top)) if bottom > 1 and top else None


@of("fraction")
def two_decimals(gold: Gold) -> Made:
    value = value_of(gold)
    if (rounded := round(value, 2)) == value:
        return None
    text = f"{float(rounded):.2f}"
    return text, f"Rational('{text}')"


@of("fraction")
def whole_part_beside_it(gold: Gold) -> Made:
    top, bottom = ratio(gold)
    if not top > 0 or bottom == 1:
        return None
    return rf"1\frac{{{top}}}{{{bottom}}}", f"1 + Rational({top}, {bottom})"


@of("decimal")
def last_decimal_raised(gold: Gold) -> Made:
    digit = gold.text[-1]
    changed = gold.text[:-1] + str((int(digit) + 1) % 10 or 1)
    return (changed, f"Rational('{changed.replace(',', '')}')") if digit != "0" else None


@of("decimal")
def point_moved(gold: Gold) -> Made:
    text = re.sub(r"([0-9]*)\.([0-9])", r"\1\2.", gold.text).rstrip(".")
    return (text, f"Rational('{text}')") if value_of(gold) and "," not in text else None


# Polynomials


@of("polynomial")
def last_sign_changed(gold: Gold) -> Made:
    terms = parts(gold.text.replace(" ", ""), "+-")
    if len(terms) < 2:
        return None
    terms[-1] = ("-" if terms[-1][0] == "+" else "+") + terms[-1][1:]
    return "".join(terms)


@of("polynomial")
def last_term_lost(gold: Gold) -> Made:
    terms = parts(gold.text.replace(" ", ""), "+-")
    return "".join(terms[:-1]) if len(terms) > 1 else None


@of("polynomial")
def first_number_raised(gold: Gold) -> Made:
    changed = re.sub(r"(?<!\^)(?<!\^\{)(?<![0-9])[0-9]+", lambda number: str(int(number[0]) + 1), gold.text, count=1)
    return changed if changed != gold.text else None


@of("polynomial")
def exponent_raised(gold: Gold) -> Made:
    changed = re.sub(r"\^(\{?)([0-9]+)", lambda match: f"^{match[1]}{int(match[2]) + 1}", gold.text, count=1)
    return changed if changed != gold.text and not re.search(r"\^[0-9]{2}", changed) else None


@of("polynomial")
def exponent_lost(gold: Gold) -> Made:
    changed = re.sub(r"\^(?:\{[0-9]+\}|[0-9])", "", gold.text, count=1)
    return changed if changed != gold.text else None


@of("polynomial")
def one_added(gold: Gold) -> Made:
    return f"{gold.text}+1"


@of("polynomial")
def capital_symbol(gold: Gold) -> Made:
    letter = next(letter for letter in gold.text if letter.isalpha())
    return gold.text.replace(letter, letter.swapcase(), 1)


@of("polynomial")
def other_symbol(gold: Gold) -> Made:
    letter = next(letter for letter in gold.text if letter.isalpha())
    other = next(other for other in "qwvu" if other not in gold.text)
    return gold.text.replace(letter, other)


@of("polynomial")
def symbol_lost(gold: Gold) -> Made:
    changed = re.sub(r"(?<=[0-9])[a-zA-Z](?!\^)", "", gold.text, count=1)
    return changed if changed != gold.text else None


@of("polynomial")
def squared_polynomial(gold: Gold) -> Made:
    return f"({gold.text})^2"


@of("polynomial")
def equation_with_zero(gold: Gold) -> Made:
    return f"{gold.text} = 0"


# Structures


@of("tuple")
def coordinates_exchanged(gold: Gold) -> Made:
    plain = gold.text.replace(r"\left", "").replace(r"\right", "").strip()
    entries = [entry.lstrip(",").strip() for entry in parts(plain[1:-1], ",")]
    return f"({', '.join(reversed(entries))})" if entries != entries[::-1] else None


@of("tuple", "interval", "list")
def last_entry_raised(gold: Gold) -> Made:
    numbers = list(re.finditer(r"[0-9]+", gold.text))
    if not numbers:
        return None
    last = numbers[-1]
    return gold.text[: last.start()] + str(int(last[0]) + 1) + gold.text[last.end() :]


@of("tuple")
def coordinate_more(gold: Gold) -> Made:
    plain = gold.text.replace(r"\left", "").replace(r"\right", "").strip()
    return f"{plain[:-1]}, 0)"


@of("tuple")
def set_of_coordinates(gold: Gold) -> Made:
    plain = gold.text.replace(r"\left", "").replace(r"\right", "").strip()
    return rf"\{{{plain[1:-1]}\}}"


@of("tuple")
def sign_of_a_coordinate(gold: Gold) -> Made:
    plain = gold.text.replace(r"\left", "").replace(r"\right", "").strip()
    first = plain[1:].lstrip()
    if first.startswith("0"):
        return None
    return f"({first[1:]}" if first.startswith("-") else f"(-{first}"


@of("interval")
def other_left_bracket(gold: Gold) -> Made:
    plain = gold.text.replace(r"\left", "").replace(r"\right", "").strip()
    return None if r"(-\infty" in plain else ("[" if plain[0] == "(" else "(") + plain[1:]


@of("interval")
def other_right_bracket(gold: Gold) -> Made:
    plain = gold.text.replace(r"\left", "").replace(r"\right", "").strip()
    return None if r"\infty" in plain.rpartition(",")[2] else plain[:-1] + ("]" if plain[-1] == ")" else ")")


@of("interval")
def its_ends_alone(gold: Gold) -> Made:
    plain = gold.text.replace(r"\left", "").replace(r"\right", "").strip()
    return None if "infty" in plain else rf"\{{{plain[1:-1]}\}}"


@of("interval")
def start_alone(gold: Gold) -> Made:
    plain = gold.text.replace(r"\left", "").replace(r"\right", "").strip()
    return parts(plain[1:-1], ",")[0]


@of("union")
def a_part_lost(gold: Gold) -> Made:
    return gold.text.split(r"\cup")[0]


@of("union")
def intersection(gold: Gold) -> Made:
    return gold.text.replace(r"\cup", r"\cap")


@of("list")
def one_lost(gold: Gold) -> Made:
    return ",".join(gold.text.split(",")[:-1])


@of("list")
def one_twice(gold: Gold) -> Made:
    return gold.text + ", " + gold.text.split(",")[0]


@of("list")
def point_in_reverse(gold: Gold) -> Made:
    entries = [entry.strip() for entry in gold.text.split(",")]
    return f"({', '.join(reversed(entries))})" if entries != entries[::-1] else None


@of("word")
def part_of_the_word(gold: Gold) -> Made:
    return rf"\text{{{gold.text.replace(chr(92) + 'text', '').strip('{} ')[:-1]}}}"


@of("word")
def not_it(gold: Gold) -> Made:
    return rf"\text{{not {gold.text.replace(chr(92) + 'text', '').strip('{} ')}}}"


@of("word")
def another_word(gold: Gold) -> Made:
    return r"\text{Wednesday}" if "Wednesday" not in gold.text else r"\text{Sunday}"


# Everything else


@of("other")
def two_added(gold: Gold) -> Made:
    return (
        f"{gold.text}+2"
        if not re.search(r"[=<>,;\[]|\\approx|\\(?:le|ge|in|text|begin|cup|pm|circ|%)|%", gold.text)
        else None
    )


@of("other")
def twice(gold: Gold) -> Made:
    return f"2({gold.text})" if not re.search(r"[=<>,;\[]|\\(?:le|ge|in|text|begin|cup)", gold.text) else None


@of("other")
def some_number(gold: Gold) -> Made:
    return "8675309"


@of("other")
def radicand_raised(gold: Gold) -> Made:
    changed = re.sub(r"\\sqrt\{([0-9]+)\}", lambda match: rf"\sqrt{{{int(match[1]) + 1}}}", gold.text, count=1)
    return changed if changed != gold.text else None


@of("other")
def root_lost(gold: Gold) -> Made:
    changed = re.sub(r"\\sqrt\{([0-9]+)\}", r"(\1)", gold.text, count=1)
    return changed if changed != gold.text and "sqrt{1}" not in gold.text else None


@of("other")
def pi_lost(gold: Gold) -> Made:
    changed = gold.text.replace(r"\pi", "")
    return changed if changed not in (gold.text, "", "-") and not changed.endswith(("+", "-")) else None


@of("other")
def conjugate(gold: Gold) -> Made:
    match = re.fullmatch(r"(-?[0-9]+)([-+])([0-9]*)i", gold.text)
    return f"{match[1]}{'-' if match[2] == '+' else '+'}{match[3]}i" if match else None


@of("other")
def real_and_imaginary_exchanged(gold: Gold) -> Made:
    match = re.fullmatch(r"(-?[0-9]+)([-+][0-9]+)i", gold.text)
    return f"{int(match[2])}{int(match[1]):+d}i" if match and int(match[1]) != int(match[2]) else None


@of("other")
def base_raised(gold: Gold) -> Made:
    match = re.fullmatch(r"([0-9]+)_\{?([0-9]+)\}?", gold.text)
    return f"{match[1]}_{{{int(match[2]) + 1}}}" if match else None


@of("other")
def base_lost(gold: Gold) -> Made:
    match = re.fullmatch(r"([0-9]+)_\{?([0-9]+)\}?", gold.text)
    return match[1] if match else None
