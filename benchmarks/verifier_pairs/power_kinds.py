r"""Kinds of pairs of powers with sums in the exponent, of gcd, lcm, min, max and absolute values, of antiderivatives.

Left out: an antiderivative without its constant, which some accept; ``(-1)^{m-n}``, which is ``(-1)^{m+n}`` for whole
numbers alone.
"""

from __future__ import annotations

from collections.abc import Iterator

from verifier_pairs.formula_forms import MEANINGS, TEXTS, Antiderivative, Bounded, Power, plus
from verifier_pairs.own_kinds import Answer, right, wrong


@right(Power)
def summands_exchanged(gold: Power) -> Iterator[Answer]:
    if len(gold.summands) > 1 and gold.summands[-1][0] == "+":
        summands = (gold.summands[-1].removeprefix("+"), f"+{gold.summands[0]}", *gold.summands[1:-1])
        yield gold.writing(summands), gold.means(summands)


@right(Power)
def product_of_two_powers(gold: Power) -> Iterator[Answer]:
    if len(gold.summands) > 1:
        first, second = gold.summands[:1], gold.summands[1:]
        yield f"{gold.writing(first)} \\cdot {gold.writing(second)}", f"{gold.means(first)} * {gold.means(second)}"


@right(Power)
def one_more_and_divided(gold: Power) -> Iterator[Answer]:
    raised = (*gold.summands, "+1")
    yield rf"\frac{{{gold.writing(raised)}}}{{{gold.base.strip('()')}}}", f"{gold.means(raised)} / {gold.means(('1',))}"


@wrong(Power)
def summand_dropped(gold: Power) -> Iterator[Answer]:
    for place in range(len(gold.summands)):
        rest = gold.summands[:place] + gold.summands[place + 1 :]
        if rest:
            yield gold.writing(rest), gold.means(rest)


@wrong(Power)
def exponent_one_more(gold: Power) -> Iterator[Answer]:
    yield gold.writing((*gold.summands, "+1")), gold.means((*gold.summands, "+1"))


@wrong(Power)
def sign_of_a_summand(gold: Power) -> Iterator[Answer]:
    last = gold.summands[-1]
    summands = (*gold.summands[:-1], ("-" if last[0] != "-" else "+") + last.lstrip("+-"))
    if gold.base != "(-1)":  # whose powers know parity alone
        yield gold.writing(summands), gold.means(summands)


@wrong(Power)
def minus_the_power(gold: Power) -> Iterator[Answer]:
    yield f"-{gold.text}", f"-({gold.meaning})"


@wrong(Power)
def base_without_brackets(gold: Power) -> Iterator[Answer]:
    if gold.base.startswith("("):
        plain = gold.base.strip("()-")
        yield f"-{gold.writing(gold.summands, plain)}", f"-({gold.means(gold.summands, plain)})"


@wrong(Power)
def sign_of_the_base(gold: Power) -> Iterator[Answer]:
    if gold.base.startswith("("):
        plain = gold.base.strip("()-")
        yield gold.writing(gold.summands, plain), gold.means(gold.summands, plain)


@wrong(Power)
def product_in_the_exponent(gold: Power) -> Iterator[Answer]:
    if len(gold.summands) == 2 and gold.summands[1][1:].isalpha():
        first, second = (summand.lstrip("+-") for summand in gold.summands)
        yield gold.writing((first, second)), gold.means((f"{first} * {second}",))


@right(Bounded)
def arguments_exchanged(gold: Bounded) -> Iterator[Answer]:
    if gold.function != "floor":
        text, meaning = TEXTS[gold.function], MEANINGS[gold.function]
        yield text.format(gold.constant, "n"), meaning.format(gold.constant, "n")


@right(Bounded)
def by_another_identity(gold: Bounded) -> Iterator[Answer]:
    c = gold.constant
    if gold.function == "gcd":
        yield rf"\gcd(n + {c}, {c})", f"gcd(n + {c}, {c})"
    if gold.function == "max":
        yield rf"\frac{{n + {c} + |n - {c}|}}{{2}}", f"(n + {c} + Abs(n - {c})) / 2"
        yield rf"-\min(-n, -{c})", f"-Min(-n, -{c})"
    if gold.function == "min":
        yield rf"n + {c} - \max(n, {c})", f"n + {c} - Max(n, {c})"
    if gold.function == "floor":
        yield rf"\left\lfloor \frac{{n + {c}}}{{{c}}} \right\rfloor - 1", f"(n + {c}) // {c} - 1"
    if gold.function == "abs":
        yield rf"\sqrt{{(n - {c})^2}}", f"sqrt((n - {c})**2)"
        yield rf"\max(n - {c}, {c} - n)", f"Max(n - {c}, {c} - n)"


@wrong(Bounded)
def constant_raised(gold: Bounded) -> Iterator[Answer]:
    other = Bounded(gold.function, gold.constant + 1)
    yield other.text, other.meaning


@wrong(Bounded)
def constant_doubled(gold: Bounded) -> Iterator[Answer]:
    other = Bounded(gold.function, 2 * gold.constant)
    yield other.text, other.meaning


@wrong(Bounded)
def constant_ten_times(gold: Bounded) -> Iterator[Answer]:
    other = Bounded(gold.function, 10 * gold.constant)
    yield other.text, other.meaning


@wrong(Bounded)
def opposite_function(gold: Bounded) -> Iterator[Answer]:
    opposites = {"gcd": "lcm", "lcm": "gcd", "min": "max", "max": "min"}
    if gold.function in opposites:
        other = Bounded(opposites[gold.function], gold.constant)
        yield other.text, other.meaning


@wrong(Bounded)
def one_argument_alone(gold: Bounded) -> Iterator[Answer]:
    yield "n", "n"
    yield str(gold.constant), str(gold.constant)


@wrong(Bounded)
def its_value_for_small_numbers(gold: Bounded) -> Iterator[Answer]:
    if gold.function == "floor":
        yield "0", "0"
    if gold.function == "min":
        yield "n + 0", "n"


@wrong(Bounded)
def not_rounded_down(gold: Bounded) -> Iterator[Answer]:
    if gold.function == "floor":
        yield rf"\left\lceil \frac{{n}}{{{gold.constant}}} \right\rceil", f"-(-n // {gold.constant})"
        yield rf"\frac{{n}}{{{gold.constant}}}", f"n / {gold.constant}"


@wrong(Bounded)
def without_its_bars(gold: Bounded) -> Iterator[Answer]:
    if gold.function == "abs":
        yield f"n - {gold.constant}", f"n - {gold.constant}"
        yield f"{gold.constant} - n", f"{gold.constant} - n"


@wrong(Bounded)
def plus_inside_the_bars(gold: Bounded) -> Iterator[Answer]:
    if gold.function == "abs":
        yield f"|n + {gold.constant}|", f"Abs(n + {gold.constant})"


@right(Antiderivative)
def constant_renamed(gold: Antiderivative) -> Iterator[Answer]:
    for name in ("K", "c", "C_1"):
        yield f"{gold.text.removesuffix('C')}{name}", gold.meaning


@right(Antiderivative)
def constant_first(gold: Antiderivative) -> Iterator[Answer]:
    yield plus(("C", *(text for text, _ in gold.terms))), gold.meaning


@right(Antiderivative)
def with_three_in_the_constant(gold: Antiderivative) -> Iterator[Answer]:
    yield f"{gold.text.removesuffix('C')}3 + C", gold.meaning


@wrong(Antiderivative)
def term_doubled(gold: Antiderivative) -> Iterator[Answer]:
    text, meaning = gold.terms[0]
    function = " + ".join([f"2 * ({meaning})", *(other for _, other in gold.terms[1:])])
    yield plus((rf"2 \cdot {text}", *(other for other, _ in gold.terms[1:]), "C")), gold.means(function)


@wrong(Antiderivative)
def constant_times_x(gold: Antiderivative) -> Iterator[Answer]:
    yield f"{gold.text}x", gold.means(" + ".join([*(meaning for _, meaning in gold.terms), "C * x"]))


@wrong(Antiderivative)
def x_added(gold: Antiderivative) -> Iterator[Answer]:
    text = gold.text.removesuffix("C") + "x + C"
    yield text, gold.means(" + ".join([*(meaning for _, meaning in gold.terms), "x"]))


@wrong(Antiderivative)
def constant_as_a_factor(gold: Antiderivative) -> Iterator[Answer]:
    inside = " + ".join(meaning for _, meaning in gold.terms)
    yield f"C\\left({plus(text for text, _ in gold.terms)}\\right)", gold.means(f"C * ({inside})")


@wrong(Antiderivative)
def term_with_the_other_sign(gold: Antiderivative) -> Iterator[Answer]:
    function = " + ".join(f"-({meaning})" for _, meaning in gold.terms)
    yield f"-\\left({plus(text for text, _ in gold.terms)}\\right) + C", gold.means(function)


@wrong(Antiderivative)
def last_term_of_it_lost(gold: Antiderivative) -> Iterator[Answer]:
    if len(gold.terms) > 1:
        kept = gold.terms[:-1]
        yield plus((*(text for text, _ in kept), "C")), gold.means(" + ".join(meaning for _, meaning in kept))
