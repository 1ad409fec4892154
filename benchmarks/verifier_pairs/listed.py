r"""Closed numbers, terms and sets of solutions whose other writings and near-misses are listed one by one: identities
of school, and coincidences that hold to many digits, or at most points, but not exactly or everywhere.

Left out: ``\ln x^2`` for ``2\ln x``, and others that differ in their domain alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar

from verifier_pairs.own_kinds import Answer, Point, right, wrong

NUMBERS = r"""
262537412640768744 :: 262537412640768744
  ≢ e^{\pi\sqrt{163}} :: exp(pi * sqrt(163))
e^{\pi\sqrt{163}} :: exp(pi * sqrt(163))
  ≢ 262537412640768744 :: 262537412640768744
\pi :: pi
  ≢ \frac{355}{113} :: rational(355, 113)
  ≢ \sqrt{2}+\sqrt{3} :: sqrt(2) + sqrt(3)
1 :: 1
  ≡ \log_7 7 :: 1
  ≢ \cos(10^{-20}) :: cos(rational(1, 10**20))
  ≢ 1+10^{-60} :: 1 + rational(1, 10**60)
10^{20} :: 10**20
  ≡ \sqrt{10^{40}} :: sqrt(10**40)
  ≢ \sqrt{10^{40}+1} :: sqrt(10**40 + 1)
0 :: 0
  ≡ 2^{10}-1024 :: 2**10 - 1024
  ≢ 2^{-200} :: rational(1, 2**200)
  ≢ \sin(10^{-30}) :: sin(rational(1, 10**30))
1+\sqrt{2} :: 1 + sqrt(2)
  ≡ \sqrt{3+2\sqrt{2}} :: sqrt(3 + 2 * sqrt(2))
  ≡ \frac{1}{\sqrt{2}-1} :: 1 / (sqrt(2) - 1)
  ≢ \sqrt{3}+\frac{17}{25} :: sqrt(3) + rational(17, 25)
  ≢ 1-\sqrt{2} :: 1 - sqrt(2)
\frac{\sqrt{6}-\sqrt{2}}{4} :: (sqrt(6) - sqrt(2)) / 4
  ≡ \sin 15^\circ :: sin(pi / 12)
  ≡ \cos 75^\circ :: cos(5 * pi / 12)
  ≢ \sin 15 :: sin(15)
  ≢ \cos 15^\circ :: cos(pi / 12)
\frac{1+\sqrt{5}}{4} :: (1 + sqrt(5)) / 4
  ≡ \cos 36^\circ :: cos(pi / 5)
  ≡ \cos\frac{\pi}{5} :: cos(pi / 5)
  ≢ \cos 72^\circ :: cos(2 * pi / 5)
  ≢ \frac{1-\sqrt{5}}{4} :: (1 - sqrt(5)) / 4
\frac{3}{2} :: rational(3, 2)
  ≡ \log_4 8 :: log(8) / log(4)
  ≡ \frac{\ln 27}{\ln 9} :: log(27) / log(9)
  ≢ \log_8 4 :: log(4) / log(8)
  ≢ \log_4 9 :: log(9) / log(4)
\sqrt{2}-1 :: sqrt(2) - 1
  ≡ \tan\frac{\pi}{8} :: sin(pi / 8) / cos(pi / 8)
  ≡ \tan 22.5^\circ :: sin(pi / 8) / cos(pi / 8)
  ≢ \tan\frac{\pi}{7} :: sin(pi / 7) / cos(pi / 7)
2^{100} :: 2**100
  ≡ 4^{50} :: 4**50
  ≡ 2 \cdot 2^{99} :: 2 * 2**99
  ≢ 2^{99} :: 2**99
  ≢ 2^{100}+1 :: 2**100 + 1
  ≢ 100^2 :: 100**2
\ln 12 :: log(12)
  ≡ 2\ln 2 + \ln 3 :: 2 * log(2) + log(3)
  ≡ \ln 24 - \ln 2 :: log(24) - log(2)
  ≢ \ln 3 \cdot \ln 4 :: log(3) * log(4)
120 :: 120
  ≡ \binom{10}{3} :: factorial(10) / factorial(3) / factorial(7)
  ≡ 5! :: factorial(5)
  ≢ \binom{10}{4} :: factorial(10) / factorial(4) / factorial(6)
  ≢ 6! :: factorial(6)
  ≢ 5!! :: 15
0.3 :: rational(3, 10)
  ≡ 0.1+0.2 :: rational(1, 10) + rational(2, 10)
  ≢ 0.30000000000000004 :: rational(30000000000000004, 10**17)
"""
"""Text and meaning of each gold; below it, of what is the same number (≡) and of what is close to it (≢)."""

IN_X = r"""
|x| :: Abs(x) :: 1, 2, 7/3, -3, 0, -5
  ≡ \sqrt{x^2} :: sqrt(x**2)
  ≡ \max(x, -x) :: Max(x, -x)
  ≢ x :: x
  ≢ \sqrt{x^2+10^{-20}} :: sqrt(x**2 + rational(1, 10**20))
\lfloor x \rfloor :: floor(x) :: 1, 2, 7/3, -3, 0, 9999999999/10000000000
  ≡ \lfloor x+1 \rfloor - 1 :: floor(x + 1) - 1
  ≡ -\lceil -x \rceil :: -ceiling(-x)
  ≢ \lceil x \rceil - 1 :: ceiling(x) - 1
  ≢ \lfloor x+10^{-9} \rfloor :: floor(x + rational(1, 10**9))
  ≢ x :: x
\sin^2 x :: sin(x)**2 :: 1, 2, 7/3, -3, 0
  ≡ 1-\cos^2 x :: 1 - cos(x)**2
  ≡ \frac{1-\cos 2x}{2} :: (1 - cos(2 * x)) / 2
  ≢ \sin x^2 :: sin(x**2)
  ≢ \cos^2 x :: cos(x)**2
  ≢ \sin 2x :: sin(2 * x)
\sin 2x :: sin(2 * x) :: 1, 2, 7/3, -3, 0
  ≡ 2\sin x\cos x :: 2 * sin(x) * cos(x)
  ≢ 2\sin x :: 2 * sin(x)
  ≢ \sin x\cos x :: sin(x) * cos(x)
x :: x :: 1, 2, 7/3, -3, 0, -8
  ≡ \sqrt[3]{x^3} :: x
  ≡ \ln e^x :: log(exp(x))
  ≢ \sqrt{x^2} :: Abs(x)
  ≢ x+10^{-12} :: x + rational(1, 10**12)
  ≢ \arcsin(\sin x) :: asin(sin(x))
\max(x, 0) :: Max(x, 0) :: 1, 2, 7/3, -3, 0, -1/10000000000
  ≡ \frac{x+|x|}{2} :: (x + Abs(x)) / 2
  ≢ \max(x, -10^{-9}) :: Max(x, -rational(1, 10**9))
  ≢ |x| :: Abs(x)
1024^x :: 1024**x :: 1, 2, 3
  ≡ 2^{10x} :: 2**(10 * x)
  ≡ 4^{5x} :: 4**(5 * x)
  ≢ 1000^x :: 1000**x
  ≢ 2^{10+x} :: 2**(10 + x)
  ≢ 1024x :: 1024 * x
\frac{1}{1-x} :: 1 / (1 - x) :: 2, 3, 1/2
  ≡ -\frac{1}{x-1} :: -1 / (x - 1)
  ≢ 1+x+x^2+x^3+x^4+x^5+x^6+x^7 :: (1 - x**8) / (1 - x)
  ≢ \frac{1}{x-1} :: 1 / (x - 1)
  ≢ 1-x :: 1 - x
x^2+10^{12} :: x**2 + 10**12 :: 1, 2, 7/3, -3, 0, 1000000000
  ≡ 10^{12}\left(1+\frac{x^2}{10^{12}}\right) :: 10**12 * (1 + x**2 / 10**12)
  ≢ 10^{12} :: 10**12
  ≢ x^2+10^{11} :: x**2 + 10**11
  ≢ x^2+10^{12}+1 :: x**2 + 10**12 + 1
e^{-x} :: exp(-x) :: 1, 2, 7/3, -3, 0
  ≡ \frac{1}{e^x} :: 1 / exp(x)
  ≢ -e^x :: -exp(x)
  ≢ e^x :: exp(x)
  ≢ e^{-x}+e^{-100} :: exp(-x) + exp(-100)
"""
"""Likewise, of terms in x, with the values of x at which they are compared."""

SETS = r"""
\pm 3 :: x in (3, -3) :: 3, -3, 4, -4, 0
  ≡ x = \pm 3 :: x == 3 or x == -3
  ≡ 3, -3 :: x in (-3, 3)
  ≡ \{-3, 3\} :: x in (-3, 3)
  ≡ x = -3 \text{ or } x = 3 :: x == 3 or x == -3
  ≡ \mp 3 :: x in (-3, 3)
  ≢ 3 :: x == 3
  ≢ -3 :: x == -3
  ≢ \pm 4 :: x in (-4, 4)
  ≢ 0 :: x == 0
  ≢ -3 < x < 3 :: bool(-3 < x) and bool(x < 3)
2 \pm \sqrt{5} :: (x - 2)**2 == 5 :: 0, 2
  ≡ 2+\sqrt{5}, 2-\sqrt{5} :: x in (2 + sqrt(5), 2 - sqrt(5))
  ≡ \frac{4 \pm \sqrt{20}}{2} :: (2 * x - 4)**2 == 20
  ≢ 2 :: x == 2
\emptyset :: x != x :: 0, 1
  ≡ \varnothing :: x != x
  ≡ \{\} :: x != x
  ≢ 0 :: x == 0
  ≢ \{0\} :: x == 0
  ≢ \mathbb{R} :: x == x
\mathbb{R} :: x == x :: 0, 1, 1/2, -3
  ≡ (-\infty, \infty) :: x == x
  ≡ x \in \mathbb{R} :: x == x
  ≡ \text{all real numbers} :: x == x
  ≢ \mathbb{Z} :: x % 1 == 0
  ≢ \mathbb{R} \setminus \{0\} :: x != 0
  ≢ [0, \infty) :: x >= 0
  ≢ \emptyset :: x != x
\mathbb{R} \setminus \{2\} :: x != 2 :: 0, 1, 2, -2
  ≡ (-\infty, 2) \cup (2, \infty) :: bool(x < 2) or bool(x > 2)
  ≡ x \ne 2 :: x != 2
  ≡ \text{all real numbers except } 2 :: x != 2
  ≢ \{2\} :: x == 2
  ≢ \mathbb{R} :: x == x
  ≢ \mathbb{R} \setminus \{-2\} :: x != -2
  ≢ \mathbb{R} \setminus \{1, 2\} :: x not in (1, 2)
\{1, 2, 3\} :: x in (1, 2, 3) :: 0, 1, 2, 3, 4, 3/2, 6
  ≡ \{3, 1, 2\} :: x in (3, 1, 2)
  ≡ \{1, 2\} \cup \{3\} :: x in (1, 2) or x == 3
  ≢ \{1, 2\} :: x in (1, 2)
  ≢ \{1, 2, 4\} :: x in (1, 2, 4)
  ≢ \{1, 2, 3, 4\} :: x in (1, 2, 3, 4)
  ≢ 6 :: x == 6
  ≢ [1, 3] :: bool(1 <= x) and bool(x <= 3)
x^2 = 4 :: x in (2, -2) :: 2, -2, 4
  ≡ 4 = x^2 :: 4 == x**2
  ≢ x = 2 :: x == 2
  ≢ x^2 = 2 :: x**2 == 2
  ≢ x = 4 :: x == 4
"""
"""Likewise, of sets of numbers x."""
PERIODIC = r"""
x = \frac{\pi}{4} + k\pi, k \in \mathbb{Z} :: (4 * x - 1) % 4 == 0 :: 1/4, 5/4, -3/4, 3/4, 0, 1
  ≡ x = \frac{\pi}{4} + n\pi, n \in \mathbb{Z} :: (4 * x - 1) % 4 == 0
  ≡ x = \frac{5\pi}{4} + k\pi, k \in \mathbb{Z} :: (4 * x - 5) % 4 == 0
  ≢ x = \frac{\pi}{4} + 2k\pi, k \in \mathbb{Z} :: (4 * x - 1) % 8 == 0
  ≢ x = \frac{\pi}{4} :: 4 * x == 1
  ≢ x = \frac{3\pi}{4} + k\pi, k \in \mathbb{Z} :: (4 * x - 3) % 4 == 0
  ≢ x = \frac{\pi}{4} + \frac{k\pi}{2}, k \in \mathbb{Z} :: (4 * x - 1) % 2 == 0
x = k\pi, k \in \mathbb{Z} :: x % 1 == 0 :: 0, 1, 2, -1, 1/2
  ≡ x = \pi n, n \in \mathbb{Z} :: x % 1 == 0
  ≢ x = 2k\pi, k \in \mathbb{Z} :: x % 2 == 0
  ≢ x = \frac{k\pi}{2}, k \in \mathbb{Z} :: (2 * x) % 1 == 0
  ≢ x = 0 :: x == 0
"""
"""Likewise, where the meaning is of x over pi."""


@dataclass(frozen=True)
class Closed:
    """A number, other writings of it (``answers["≡"]``), and others that lie close to it (``answers["≢"]``)."""

    text: str
    meaning: str
    answers: dict[str, list[Answer]]
    points: ClassVar[tuple[Point, ...]] = ({},)


@dataclass(frozen=True)
class Term:
    """A term in x, others that equal it at every point, and others that do not at one of ``points``."""

    text: str
    meaning: str
    answers: dict[str, list[Answer]]
    points: tuple[Point, ...]


@dataclass(frozen=True)
class Solutions:
    """A set of numbers, others that have the same elements, and others that differ by one of ``points``."""

    text: str
    meaning: str
    answers: dict[str, list[Answer]]
    points: tuple[Point, ...]


def entries(table: str) -> Iterator[tuple[list[str], dict[str, list[Answer]]]]:
    """Of each gold its fields, and its answers by their label.

    >>> list(entries("2 :: 2 :: 0, 1\\n  ≡ 1+1 :: 1 + 1\\n  ≢ 3 :: 3"))
    [(['2', '2', '0, 1'], {'≡': [('1+1', '1 + 1')], '≢': [('3', '3')]})]
    """
    found: list[tuple[list[str], dict[str, list[Answer]]]] = []
    for line in table.strip().splitlines():
        first, *others = line.strip().split(" :: ")
        if line.startswith(" "):
            found[-1][1][first[0]].append((first[2:], others[0]))
        else:
            found.append(([first, *others], {"≡": [], "≢": []}))
    yield from found


CLOSED = [Closed(text, meaning, answers) for (text, meaning), answers in entries(NUMBERS)]


def at(values: str) -> tuple[Point, ...]:
    """Points by the values of x: ``0, 1/2``."""
    return tuple({"x": Fraction(value)} for value in values.split(", "))


TERMS = [Term(text, meaning, answers, at(values)) for (text, meaning, values), answers in entries(IN_X)]
SOLUTIONS = [
    Solutions(text, meaning, answers, at(values))
    for table in (SETS, PERIODIC)
    for (text, meaning, values), answers in entries(table)
]


@right(Closed)
def number_by_an_identity(gold: Closed) -> Iterator[Answer]:
    yield from gold.answers["≡"]


@wrong(Closed)
def number_close_to_it(gold: Closed) -> Iterator[Answer]:
    yield from gold.answers["≢"]


@right(Term)
def term_by_an_identity(gold: Term) -> Iterator[Answer]:
    yield from gold.answers["≡"]


@wrong(Term)
def term_alike_at_most_points(gold: Term) -> Iterator[Answer]:
    yield from gold.answers["≢"]


@right(Solutions)
def the_same_solutions(gold: Solutions) -> Iterator[Answer]:
    yield from gold.answers["≡"]


@wrong(Solutions)
def other_solutions(gold: Solutions) -> Iterator[Answer]:
    yield from gold.answers["≢"]
