r"""Kinds of pairs of equations in two symbols: lines, circles, hyperbolas."""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction

from verifier_pairs.condition_forms import Circle, Hyperbola, Line, circle, linear, squares
from verifier_pairs.own_kinds import Answer, exact, latex, right, wrong


@right(Line)
def line_times_three(gold: Line) -> Iterator[Answer]:
    other = Line(3 * gold.a, 3 * gold.b, 3 * gold.c)
    yield other.text, other.meaning


@right(Line)
def line_times_minus_one(gold: Line) -> Iterator[Answer]:
    other = Line(-gold.a, -gold.b, -gold.c)
    yield other.text, other.meaning


@right(Line)
def line_moved_to_one_side(gold: Line) -> Iterator[Answer]:
    yield f"{linear(gold.a, gold.b)} {-gold.c:+d} = 0", f"{gold.a} * x + {gold.b} * y - ({gold.c}) == 0"


@right(Line)
def line_solved_for_y(gold: Line) -> Iterator[Answer]:
    slope, start = Fraction(-gold.a, gold.b), Fraction(gold.c, gold.b)
    constant = f"{'-' if start < 0 else '+'} {latex(abs(start))}"
    yield f"y = {latex(slope)}x {constant}", f"y == {exact(slope)} * x + {exact(start)}"


@right(Line)
def line_from_the_right(gold: Line) -> Iterator[Answer]:
    yield f"{gold.c} = {linear(gold.b, gold.a, 'yx')}", gold.meaning


@wrong(Line)
def line_shifted(gold: Line) -> Iterator[Answer]:
    yield Line(gold.a, gold.b, gold.c + 1).text, Line(gold.a, gold.b, gold.c + 1).meaning


@wrong(Line)
def line_mirrored(gold: Line) -> Iterator[Answer]:
    yield Line(gold.a, -gold.b, gold.c).text, Line(gold.a, -gold.b, gold.c).meaning


@wrong(Line)
def letters_of_the_line_exchanged(gold: Line) -> Iterator[Answer]:
    if gold.a != gold.b:
        yield Line(gold.b, gold.a, gold.c).text, Line(gold.b, gold.a, gold.c).meaning


@wrong(Line)
def left_side_alone(gold: Line) -> Iterator[Answer]:
    yield linear(gold.a, gold.b), f"{gold.a} * x + {gold.b} * y"


@wrong(Line)
def half_plane(gold: Line) -> Iterator[Answer]:
    yield rf"{linear(gold.a, gold.b)} \le {gold.c}", f"{gold.a} * x + {gold.b} * y <= {gold.c}"


@wrong(Line)
def left_side_doubled(gold: Line) -> Iterator[Answer]:
    if gold.c:
        yield Line(2 * gold.a, 2 * gold.b, gold.c).text, Line(2 * gold.a, 2 * gold.b, gold.c).meaning


@wrong(Line)
def all_but_the_line(gold: Line) -> Iterator[Answer]:
    yield rf"{linear(gold.a, gold.b)} \ne {gold.c}", f"{gold.a} * x + {gold.b} * y != {gold.c}"


@right(Circle)
def circle_multiplied_out(gold: Circle) -> Iterator[Answer]:
    constant = gold.h**2 + gold.k**2 - gold.radius**2
    mixed = "".join(f" {-2 * value:+d}{name}" for value, name in ((gold.h, "x"), (gold.k, "y")) if value)
    meaning = f"x**2 + y**2 - 2 * {gold.h} * x - 2 * {gold.k} * y + {constant} == 0"
    yield f"x^2 + y^2{mixed}{f' {constant:+d}' if constant else ''} = 0", meaning


@right(Circle)
def circle_moved_to_one_side(gold: Circle) -> Iterator[Answer]:
    yield f"{squares(gold.h, gold.k)} - {gold.radius**2} = 0", gold.meaning


@right(Circle)
def circle_doubled(gold: Circle) -> Iterator[Answer]:
    first, second = squares(gold.h, gold.k).split("^2 + ")
    meaning = f"2 * (x - ({gold.h}))**2 + 2 * (y - ({gold.k}))**2 == {2 * gold.radius**2}"
    yield f"2{first}^2 + 2{second} = {2 * gold.radius**2}", meaning


@right(Circle)
def radius_as_a_square(gold: Circle) -> Iterator[Answer]:
    yield f"{gold.radius}^2 = {squares(gold.h, gold.k)}", gold.meaning


@wrong(Circle)
def centre_opposite(gold: Circle) -> Iterator[Answer]:
    if gold.h or gold.k:
        other = Circle(-gold.h, -gold.k, gold.radius)
        yield other.text, other.meaning


@wrong(Circle)
def coordinates_of_the_centre_exchanged(gold: Circle) -> Iterator[Answer]:
    if gold.h != gold.k:
        other = Circle(gold.k, gold.h, gold.radius)
        yield other.text, other.meaning


@wrong(Circle)
def radius_not_squared(gold: Circle) -> Iterator[Answer]:
    if gold.radius > 1:
        yield f"{squares(gold.h, gold.k)} = {gold.radius}", circle(gold.h, gold.k, gold.radius)


@wrong(Circle)
def difference_of_squares(gold: Circle) -> Iterator[Answer]:
    meaning = f"(x - ({gold.h}))**2 - (y - ({gold.k}))**2 == {gold.radius**2}"
    yield f"{squares(gold.h, gold.k, '-')} = {gold.radius**2}", meaning


@wrong(Circle)
def disc(gold: Circle) -> Iterator[Answer]:
    yield rf"{squares(gold.h, gold.k)} \le {gold.radius**2}", gold.meaning.replace("==", "<=")


@right(Hyperbola)
def solved_for_y(gold: Hyperbola) -> Iterator[Answer]:
    yield rf"y = \frac{{{gold.k}}}{{x}}", f"x != 0 and x * y == {gold.k}"


@right(Hyperbola)
def doubled_product(gold: Hyperbola) -> Iterator[Answer]:
    yield f"2xy - {2 * gold.k} = 0".replace("- -", "+ "), f"2 * x * y - {2 * gold.k} == 0".replace("- -", "+ ")


@wrong(Hyperbola)
def other_product(gold: Hyperbola) -> Iterator[Answer]:
    yield Hyperbola(gold.k + 1).text, Hyperbola(gold.k + 1).meaning


@wrong(Hyperbola)
def sum_for_product(gold: Hyperbola) -> Iterator[Answer]:
    yield f"x + y = {gold.k}", f"x + y == {gold.k}"


@wrong(Hyperbola)
def quotient_for_product(gold: Hyperbola) -> Iterator[Answer]:
    yield f"y = {gold.k}x", f"y == {gold.k} * x"
