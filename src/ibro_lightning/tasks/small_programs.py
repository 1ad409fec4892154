"""Small programs: write a function of one whole number from a few of its values, judged by tests that are not shown.

    prompt    f(2)=5 f(7)=15 f(11)=23
    response  f=lambda x:x+x+1

Use it with :class:`~ibro_lightning.rewards.CodeReward` (``fenced: false``), which runs the response in its sandbox.
"""

from __future__ import annotations

import operator
import random
from collections.abc import Callable, Iterator

from ibro_lightning.errors import ConfigError, check_count
from ibro_lightning.seeding import derive_seed
from ibro_lightning.sources.base import PromptSource, as_prompt, check_template
from ibro_lightning.tasks.split import Split, check_split, in_split
from ibro_lightning.types import Problem

OPERATIONS: dict[str, Callable[[int, int], int]] = {
    "+": operator.add,
    "-": operator.sub,
    "*": operator.mul,
    "//": operator.floordiv,
    "%": operator.mod,
}
_MAX_VALUE = 999
"""Functions with larger values are drawn again: long numbers would make the task one of arithmetic."""


class SmallProgramsSource(PromptSource):
    """Functions ``f`` of a whole number, given by examples; several programs may solve a problem.

    A problem is a random expression, e.g. ``(x*3)+x``; ``meta["solution"]`` has it as a program. No function occurs
    twice, and none in both splits, whichever of its values are shown; constant functions do not occur.

    Args:
        num_problems: random expressions drawn; repeated functions are dropped.
        operations: how many operations an expression has at most.
        examples: values that the prompt shows.
        tests: further values, which the response must compute, too.
        max_argument: arguments are 0..max_argument.
        seed: of the problems.
        split, heldout_fraction: by a hash of the function's values.
        template: with ``{examples}``.
        chat: wrap the prompt as a user message for the model's chat template.
    """

    def __init__(
        self,
        num_problems: int = 1000,
        operations: int = 2,
        examples: int = 4,
        tests: int = 3,
        max_argument: int = 12,
        seed: int = 0,
        split: Split = "all",
        heldout_fraction: float = 0.15,
        template: str = "{examples}\n",
        chat: bool = False,
    ) -> None:
        check_split(split, heldout_fraction)
        check_count("num_problems", num_problems, 1)
        check_count("operations", operations, 1)
        check_count("examples", examples, 1)
        check_count("tests", tests, 1)
        check_count("max_argument", max_argument, 1)
        if examples + tests > max_argument + 1:
            remedy = f"write at least {examples + tests - 1}: examples and tests are different arguments"
            raise ConfigError("max_argument", max_argument, remedy)
        check_template("template", template, ("examples",))
        self.num_problems, self.operations, self.examples, self.tests = num_problems, operations, examples, tests
        self.max_argument, self.seed = max_argument, seed
        self.split, self.heldout_fraction, self.template, self.chat = split, heldout_fraction, template, chat

    def problems(self) -> Iterator[Problem]:
        functions: set[str] = set()
        prompts: set[str] = set()
        for index in range(self.num_problems):
            rng = random.Random(derive_seed(self.seed, "small_programs", index))
            expression, values = self._function(rng)
            arguments = rng.sample(range(self.max_argument + 1), self.examples + self.tests)
            shown = sorted(arguments[: self.examples])
            examples = " ".join(f"f({x})={values[x]}" for x in shown)
            if str(values) in functions or examples in prompts:
                continue
            functions.add(str(values))
            prompts.add(examples)
            if in_split(str(values), self.split, self.heldout_fraction):
                text = self.template.format(examples=examples)
                tests = [f"assert f({x}) == {values[x]}" for x in arguments]
                answer = {"tests": tests, "entry_point": "f"}
                meta = {"solution": f"f=lambda x:{expression}"}
                yield Problem(examples, as_prompt(text, chat=self.chat), answer, meta, own_text=(text,))

    def _function(self, rng: random.Random) -> tuple[str, list[int]]:
        """An expression in ``x``, and its values at 0..max_argument."""
        arguments = list(range(self.max_argument + 1))
        while True:
            expression, values = "x", arguments
            for _ in range(rng.randint(1, self.operations)):
                symbol, constant = rng.choice(tuple(OPERATIONS)), rng.randint(2, 9)
                by_x = symbol in "+-*" and rng.random() < 0.5  # a division by x would fail at 0
                others = arguments if by_x else [constant] * len(arguments)
                values = [OPERATIONS[symbol](value, other) for value, other in zip(values, others, strict=True)]
                left = expression if expression == "x" else f"({expression})"
                expression = f"{left}{symbol}{'x' if by_x else constant}"
            if len(set(values)) > 1 and max(map(abs, values)) <= _MAX_VALUE:
                return expression, values
