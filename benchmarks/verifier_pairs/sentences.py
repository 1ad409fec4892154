r"""Kinds of pairs whose answer is a whole response: a sentence around a number, or signs around a box.

``#`` is the gold's number, ``@`` the next one; of some near-misses, the meaning is a formula of ``n``. Left out is what
depends on the question or on habit: "about 5", ``\boxed{5}\%``, ``x > \boxed{5}``, ``\boxed{5} + 1``, "Is it 5?".
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction

from verifier_pairs.own_kinds import KINDS, Answer, Maker, Point, exact, number

RIGHT: dict[str, list[str]] = {
    "the answer is": ["The answer is #.", "So the answer is $#$.", "Therefore, the final answer is #.", "Answer: #"],
    "named in a sentence": ["So x = #", "Hence $x = #$.", "We conclude that $n = #$."],
    "we get": ["we get $#$", "This gives us $#$.", "Therefore the value is $#$."],
    "in bold": ["The answer is **#**.", "**Answer:** #"],
    "box in a sentence": [r"The answer is $\boxed{#}$.", r"Thus \boxed{#} is the answer.", r"$$\boxed{#}.$$"],
    "name before the box": [r"$x = \boxed{#}$", r"So the total is $N = \boxed{#}.$"],
    "noun behind the box": [r"\boxed{#} dollars", r"There are $\boxed{#}$ ways to do this.", r"\boxed{#} apples"],
    "other numbers before": [
        r"Out of 17 cases 2 are impossible. The answer is #.",
        r"Adding 31 and 47, then dividing by 2 gives \boxed{#}.",
        "It is not @. The answer is #.",
    ],
    "said of a name": ["The value of x is #.", "x equals #.", "# is the answer."],
    "other delimiters": [r"The answer is \(#\).", r"\[\boxed{#}\]", "We get\n$$#$$"],
    "inside of the box": [r"\boxed{x = #}", r"\boxed{ # }", r"\boxed{\text{#}}", r"\boxed{$#$}", r"\boxed{\mathbf{#}}"],
    "corrected before": [
        r"At first I got \boxed{@}, but the right one is \boxed{#}.",
        "I thought @, but the answer is #.",
    ],
}
WRONG: dict[str, list[str | tuple[str, str]]] = {
    "more than one number": [
        *("The answer is #, @ and 10^9.", "The answer is # or @.", "The answer is either # or @."),
        *("The answers are # and @.", r"$x = #$ or $x = @$", r"\boxed{#} or \boxed{@}", "The answer is $#$ and $@$."),
    ],
    "sign in words": [
        ("The answer is negative #.", "-n"),
        ("The answer is minus #.", "-n"),
        (r"negative \boxed{#}", "-n"),
    ],
    "power in words": [
        *(("The answer is # squared.", "n**2"), ("The answer is # cubed.", "n**3")),
        *(("The answer is the square of #.", "n**2"), ("The answer is the square root of #.", "sqrt(n)")),
        *(("The answer is # to the power of 3.", "n**3"), ("The answer is # factorial.", "")),
    ],
    "denied": [
        *("The answer is not $#$.", "The answer is not #.", "not $#$", "The answer isn't #.", "It cannot be #."),
        *("The answer is anything but #.", r"The answer is not \boxed{#}."),
    ],
    "denied behind it": ["# is not the answer.", "It is false that the answer is #.", r"$\boxed{#}$ is wrong."],
    "no answer": [
        *("If the answer were #, 0 would be 1. There is none.", "I don't know whether it is #.", "There is no answer."),
    ],
    "part or place in words": [
        *(("The answer is # out of 1000003.", "n / 1000003"), ("The answer is #% of 1000003.", "n * 1000003 / 100")),
        ("The answer is the #th prime number.", ""),
    ],
    "bound in words": [
        *("The answer is at least #.", "The answer is at most #.", "The answer is more than #.", "at least #"),
        *("The answer is less than #.", "The answer is greater than $#$.", "The answer is fewer than #."),
    ],
    "range in words": [
        "The answer is between # and @.",
        "The answer is from # to @.",
        "anything from 0 to #",
        "up to #",
    ],
    "factor before the box": [
        *((r"$2\boxed{#}$", "2 * n"), (r"$-\boxed{#}$", "-n"), (r"$3 \cdot \boxed{#}$", "3 * n")),
        *((r"$\frac{1}{2}\boxed{#}$", "n / 2"), (r"$\sqrt{\boxed{#}}$", "sqrt(n)")),
    ],
    "power behind the box": [
        *((r"$\boxed{#}^2$", "n**2"), (r"$\boxed{#}^{-1}$", "1 / n"), (r"$\boxed{#}\pi$", "n * pi")),
        *((r"$\boxed{#} \cdot 10^6$", "n * 10**6"), (r"$\boxed{#} \times 5$", "5 * n")),
    ],
    "scale in words": [
        *(
            (r"\boxed{#} million", "n * 10**6"),
            (r"\boxed{#} thousand", "n * 1000"),
            (r"$\boxed{#}$ billion", "n * 10**9"),
        ),
        *(("The answer is # million.", "n * 10**6"), ("The answer is # thousand.", "n * 1000")),
        *(("The answer is # dozen.", "n * 12"), ("The answer is # hundred.", "n * 100")),
    ],
    "multiple in words": [
        *(("The answer is half of #.", "n / 2"), ("The answer is twice #.", "2 * n")),
        *(("The answer is a third of #.", "n / 3"), ("The answer is one more than #.", "n + 1")),
        *(("The answer is # less than 1000000007.", "1000000007 - n"), ("The answer is # plus 2.", "n + 2")),
        *(("The answer is # times 3.", "3 * n"), ("The answer is # over 7.", "n / 7")),
    ],
    "operation behind it": [
        *(("The answer is $#$ + 2.", "n + 2"), ("The answer is # * 3.", "3 * n"), ("The answer is #/7.", "n / 7")),
        *(("The answer is #^2.", "n**2"), (r"The answer is $#\pi$.", "n * pi"), (r"So $x = 2 \cdot #$.", "2 * n")),
    ],
    "another behind it": [
        *(("The answer is #. No, the answer is @.", "n + 1"), (r"\boxed{#}, or rather \boxed{@}", "n + 1")),
        *(("I thought #, but the answer is @.", "n + 1"), (r"Not \boxed{#} but \boxed{@}.", "n + 1")),
    ],
    "an inequality in a sentence": ["So $x > #$.", r"Hence $x \ne #$.", r"We get $x \le #$.", "The answer is x < #."],
}
AROUND: list[tuple[bool, str, str]] = [
    (True, "any form: the answer is", "The answer is $#$."),
    (True, "any form: last line", "We collect what we found above.\n\nAnswer: $#$"),
    (True, "any form: box in a sentence", r"Therefore, the answer is $\boxed{#}$."),
    (True, "any form: displayed in the box", r"\[\boxed{\displaystyle #}\]"),
    (True, "any form: full stop in the box", r"\boxed{#.}"),
    (False, "any form: denied", "The answer is not $#$."),
    (False, "any form: denied in the box", r"\boxed{\text{not } #}"),
    (False, "any form: or another", r"\boxed{# \text{ or } 8675309}"),
    (False, "any form: another beside it in the box", r"\boxed{#, \; 8675309}"),
    (False, "any form: another in a second box", r"\boxed{#} and \boxed{8675309}"),
    (False, "any form: corrected behind", r"At first I got \boxed{#}, but the right one is \boxed{8675309}."),
]
"""Of golds of every other form: sentences in which ``#`` is the gold."""


@dataclass(frozen=True)
class Sentence:
    """A number that is given by whole responses."""

    value: Fraction
    meaning = "n"

    @property
    def text(self) -> str:
        return number(self.value)

    @property
    def points(self) -> tuple[Point, ...]:
        return ({"n": self.value},)

    def fill(self, template: str) -> str:
        return template.replace("#", self.text).replace("@", number(self.value + 1))


@dataclass(frozen=True)
class Said:
    """A number that a sentence says by another one: 25 by "5 squared"."""

    value: Fraction
    response: str
    points: tuple[Point, ...] = ({},)

    @property
    def text(self) -> str:
        return number(self.value)

    @property
    def meaning(self) -> str:
        return exact(self.value)


def _of(templates: list[str | tuple[str, str]], same: bool) -> Maker:
    def make(gold: Sentence) -> Iterator[Answer]:
        for template in templates:
            text, meaning = template if isinstance(template, tuple) else (template, "n" if same else "")
            yield gold.fill(text), meaning

    return make


def _said(gold: Said) -> Iterator[Answer]:
    yield gold.response, ""


for _name, _templates in RIGHT.items():
    KINDS[True, f"sentence: {_name}"] = (Sentence, _of(list(_templates), True))
for _name, _near in WRONG.items():
    KINDS[False, f"sentence: {_name}"] = (Sentence, _of(_near, False))
KINDS[True, "sentence: the number said in words"] = (Said, _said)
