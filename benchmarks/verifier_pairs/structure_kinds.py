r"""Kinds of pairs of matrices, vectors, values of several letters, and words.

Left out: a row for a column.
"""

from __future__ import annotations

from collections.abc import Iterator

from verifier_pairs.forms import Assignment, Matrix, Vector, Word, grid
from verifier_pairs.own_kinds import Answer, right, wrong

Rows = tuple[tuple[int, ...], ...]


@right(Matrix)
def square_brackets(gold: Matrix) -> Iterator[Answer]:
    yield grid(gold.rows, "bmatrix"), gold.meaning


@right(Matrix)
def brackets_around_plain_rows(gold: Matrix) -> Iterator[Answer]:
    yield rf"\left[ {grid(gold.rows, 'matrix')} \right]", gold.meaning


@right(Matrix)
def entries_not_cancelled(gold: Matrix) -> Iterator[Answer]:
    yield grid(tuple(tuple(rf"\frac{{{6 * entry}}}{{6}}" for entry in row) for row in gold.rows)), gold.meaning


@right(Matrix)
def half_of_its_double(gold: Matrix) -> Iterator[Answer]:
    yield rf"\frac{{1}}{{2}} {grid(tuple(tuple(2 * entry for entry in row) for row in gold.rows))}", gold.meaning


@right(Matrix)
def transposed_twice(gold: Matrix) -> Iterator[Answer]:
    yield f"{grid(transposed(gold.rows))}^T", gold.meaning


@right(Matrix)
def named_matrix(gold: Matrix) -> Iterator[Answer]:
    yield f"A = {gold.text}", gold.meaning


def transposed(rows: Rows) -> Rows:
    return tuple(zip(*rows, strict=True))


@wrong(Matrix)
def transpose(gold: Matrix) -> Iterator[Answer]:
    if (rows := transposed(gold.rows)) != gold.rows:
        yield grid(rows), str(rows)


@wrong(Matrix)
def transpose_sign(gold: Matrix) -> Iterator[Answer]:
    if (rows := transposed(gold.rows)) != gold.rows:
        yield f"{gold.text}^T", str(rows)


@wrong(Matrix)
def last_number_raised(gold: Matrix) -> Iterator[Answer]:
    rows = (*gold.rows[:-1], (*gold.rows[-1][:-1], gold.rows[-1][-1] + 1))
    yield grid(rows), str(rows)


@wrong(Matrix)
def number_above_the_diagonal_raised(gold: Matrix) -> Iterator[Answer]:
    first = gold.rows[0]
    rows = ((first[0], first[1] + 1, *first[2:]), *gold.rows[1:])
    yield grid(rows), str(rows)


@wrong(Matrix)
def rows_exchanged(gold: Matrix) -> Iterator[Answer]:
    rows = gold.rows[::-1]
    if rows != gold.rows:
        yield grid(rows), str(rows)


@wrong(Matrix)
def columns_exchanged(gold: Matrix) -> Iterator[Answer]:
    rows = tuple(row[::-1] for row in gold.rows)
    if rows != gold.rows:
        yield grid(rows), str(rows)


@wrong(Matrix)
def row_lost(gold: Matrix) -> Iterator[Answer]:
    yield grid(gold.rows[:-1]), str(gold.rows[:-1])


@wrong(Matrix)
def its_numbers_as_a_list(gold: Matrix) -> Iterator[Answer]:
    numbers = tuple(entry for row in gold.rows for entry in row)
    yield ", ".join(map(str, numbers)), str(numbers)


@wrong(Matrix)
def its_determinant(gold: Matrix) -> Iterator[Answer]:
    if len(gold.rows) == len(gold.rows[0]) == 2:
        (a, b), (c, d) = gold.rows
        yield grid(gold.rows, "vmatrix"), str(a * d - b * c)


@wrong(Matrix)
def twice_the_matrix(gold: Matrix) -> Iterator[Answer]:
    yield f"2{gold.text}", str(tuple(tuple(2 * entry for entry in row) for row in gold.rows))


@right(Vector)
def as_a_point(gold: Vector) -> Iterator[Answer]:
    yield f"({', '.join(map(str, gold.entries))})", gold.meaning


@right(Vector)
def angle_brackets_of_vectors(gold: Vector) -> Iterator[Answer]:
    yield rf"\langle {', '.join(map(str, gold.entries))} \rangle", gold.meaning


@right(Vector)
def column_in_square_brackets(gold: Vector) -> Iterator[Answer]:
    yield grid(tuple((entry,) for entry in gold.entries), "bmatrix"), gold.meaning


@right(Vector)
def of_unit_vectors(gold: Vector) -> Iterator[Answer]:
    terms = [rf"{entry:+d}\mathbf{{{axis}}}" for entry, axis in zip(gold.entries, "ijk", strict=False)]
    if len(gold.entries) == 3:
        yield "".join(terms).removeprefix("+"), gold.meaning


@wrong(Vector)
def entries_rotated(gold: Vector) -> Iterator[Answer]:
    entries = (*gold.entries[1:], gold.entries[0])
    yield Vector(entries).text, str(entries)


@wrong(Vector)
def sign_of_the_first(gold: Vector) -> Iterator[Answer]:
    entries = (-gold.entries[0], *gold.entries[1:])
    yield Vector(entries).text, str(entries)


@wrong(Vector)
def opposite_vector(gold: Vector) -> Iterator[Answer]:
    yield f"-{gold.text}", str(tuple(-entry for entry in gold.entries))


@wrong(Vector)
def entry_lost(gold: Vector) -> Iterator[Answer]:
    yield Vector(gold.entries[:-1]).text, str(gold.entries[:-1])


@wrong(Vector)
def twice_the_vector(gold: Vector) -> Iterator[Answer]:
    yield Vector(tuple(2 * entry for entry in gold.entries)).text, str(tuple(2 * entry for entry in gold.entries))


@wrong(Vector)
def set_of_entries(gold: Vector) -> Iterator[Answer]:
    yield rf"\{{{', '.join(map(str, gold.entries))}\}}", f"('set', {', '.join(map(str, sorted(set(gold.entries))))})"


@right(Assignment)
def names_in_reverse(gold: Assignment) -> Iterator[Answer]:
    other = Assignment(gold.values[::-1])
    yield other.text, other.meaning


@right(Assignment)
def values_first(gold: Assignment) -> Iterator[Answer]:
    yield ", ".join(f"{value} = {name}" for name, value in gold.values), gold.meaning


@right(Assignment)
def names_joined_by_and(gold: Assignment) -> Iterator[Answer]:
    yield gold.text.replace(", ", r" \text{ and } "), gold.meaning


@wrong(Assignment)
def values_rotated(gold: Assignment) -> Iterator[Answer]:
    names, values = zip(*gold.values, strict=True)
    other = Assignment(tuple(zip(names, (*values[1:], values[0]), strict=True)))
    yield other.text, other.meaning


@wrong(Assignment)
def one_name_changed(gold: Assignment) -> Iterator[Answer]:
    other = Assignment((*gold.values[:-1], ("w", gold.values[-1][1])))
    yield other.text, other.meaning


@wrong(Assignment)
def one_name_lost(gold: Assignment) -> Iterator[Answer]:
    other = Assignment(gold.values[:-1])
    yield other.text, other.meaning


@wrong(Assignment)
def one_value_raised(gold: Assignment) -> Iterator[Answer]:
    other = Assignment((*gold.values[:-1], (gold.values[-1][0], gold.values[-1][1] + 1)))
    yield other.text, other.meaning


@right(Word)
def upright_text(gold: Word) -> Iterator[Answer]:
    for command in ("text", "textbf", "mathrm"):
        if (answer := rf"\{command}{{{gold.word}}}") != gold.text and (command != "mathrm" or gold.word.isalpha()):
            yield answer, ""


@right(Word)
def word_in_capitals(gold: Word) -> Iterator[Answer]:
    if len(gold.word) > 1:
        yield rf"\text{{{gold.word.upper()}}}", ""


@right(Word)
def word_with_a_full_stop(gold: Word) -> Iterator[Answer]:
    yield rf"\text{{{gold.word}.}}", ""


@wrong(Word)
def another_of_its_sort(gold: Word) -> Iterator[Answer]:
    yield rf"\text{{{gold.opposite}}}", ""


@wrong(Word)
def both_words(gold: Word) -> Iterator[Answer]:
    for word in ("and", "or"):
        yield rf"\text{{{gold.word} {word} {gold.opposite}}}", ""


@wrong(Word)
def denied_word(gold: Word) -> Iterator[Answer]:
    yield rf"\text{{not {gold.word}}}", ""


@wrong(Word)
def first_letter_lost(gold: Word) -> Iterator[Answer]:
    if len(gold.word) > 1:
        yield rf"\text{{{gold.word[1:]}}}", ""


@wrong(Word)
def its_letters_in_reverse(gold: Word) -> Iterator[Answer]:
    if gold.word.lower() != gold.word[::-1].lower():
        yield rf"\text{{{gold.word[::-1]}}}", ""
