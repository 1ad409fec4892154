"""Countdown: combine given numbers with + − × ÷ to reach a target, in exact arithmetic."""

from __future__ import annotations

import ast
import json
import random
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction
from pathlib import Path

from ibro_lightning.errors import ConfigError, RewardError, check_count
from ibro_lightning.rewards import Verdict, VerifiableReward
from ibro_lightning.seeding import derive_seed
from ibro_lightning.sources.base import PromptSource, as_prompt, check_template
from ibro_lightning.tasks.split import Split, check_split, in_split
from ibro_lightning.types import Completion, Problem, Prompt

COUNTDOWN_TEMPLATE = (
    "Use the numbers {numbers} and the operations + - * / to make an expression that equals {target}. "
    "Use every number exactly once. Think step by step, then write the expression as <answer>expression</answer>."
)

_MAX_CHARACTERS = 500
"""Longer expressions are wrong: no problem needs them, and parsing adversarial text must stay cheap."""
_ALLOWED = re.compile(r"[\d+\-*/() ]+", re.ASCII)
"""Excludes hexadecimal numbers, underscores and comments, which Python would parse."""


class Countdown:
    """The rules of countdown.

    Args:
        use_all: every given number must be used exactly once (as in the public datasets); otherwise at most once.
    """

    def __init__(self, use_all: bool = True) -> None:
        self.use_all = use_all

    def verify(self, expression: str, numbers: Sequence[int], target: int) -> bool:
        """Whether ``expression``, e.g. ``(93 - 30) * 2``, reaches ``target`` with ``numbers``. Never evaluates code."""
        text = expression.strip().replace("×", "*").replace("÷", "/").replace("−", "-")
        if len(text) > _MAX_CHARACTERS or not _ALLOWED.fullmatch(text):
            return False
        try:
            tree = ast.parse(text, mode="eval")
            used: Counter[int] = Counter()
            value = _evaluate(tree.body, used)
        except (SyntaxError, ValueError, ZeroDivisionError, RecursionError, MemoryError):
            return False
        given = Counter(numbers)
        return (used == given if self.use_all else used <= given) and value == target

    @staticmethod
    def generate(seed: int, k: int, max_number: int) -> tuple[list[int], int]:
        """``k`` numbers in 1..max_number and a positive integer target that is reachable by using each once."""
        numbers, target, _ = Countdown.generate_solved(seed, k, max_number)
        return numbers, target

    @staticmethod
    def generate_solved(seed: int, k: int, max_number: int) -> tuple[list[int], int, str]:
        """As :meth:`generate`, and the expression by which the target was found, e.g. ``(93-30)*2``."""
        rng = random.Random(seed)
        while True:
            numbers = [rng.randint(1, max_number) for _ in range(k)]
            terms = [(Fraction(number), str(number)) for number in numbers]
            while len(terms) > 1:
                rng.shuffle(terms)
                (a, left), (b, right) = terms.pop(), terms.pop()
                results = [a + b, a - b, a * b] + ([a / b] if b else [])
                index = rng.choice(range(len(results)))
                terms.append((results[index], f"({left}{'+-*/'[index]}{right})"))
            target, expression = terms[0]
            if target.denominator == 1 and 0 < target <= 10 * max_number and target not in numbers:
                return numbers, int(target), expression[1:-1]


def _evaluate(node: ast.expr, used: Counter[int]) -> Fraction:
    if isinstance(node, ast.Constant) and type(node.value) is int:
        used[node.value] += 1
        return Fraction(node.value)
    if isinstance(node, ast.BinOp):
        left, right = _evaluate(node.left, used), _evaluate(node.right, used)
        match node.op:
            case ast.Add():
                return left + right
            case ast.Sub():
                return left - right
            case ast.Mult():
                return left * right
            case ast.Div():
                return left / right
    raise ValueError("only numbers, + - * / and parentheses are allowed")


class CountdownSource(PromptSource):
    """Countdown problems, generated or from a JSON-lines file with ``numbers`` and ``target``.

    Generated problems have one of their solutions in ``meta["solution"]``.

    Args:
        path: the file; None generates problems.
        num_problems, num_numbers, max_number, seed: of the generated problems, each of which has a solution.
        split, heldout_fraction: generated problems are split by a hash of numbers and target; a file is not split.
        template: with ``{numbers}`` and ``{target}``.
        chat: wrap the prompt as a user message for the model's chat template.
    """

    def __init__(
        self,
        path: str | None = None,
        num_problems: int = 1000,
        num_numbers: int = 3,
        max_number: int = 99,
        seed: int = 0,
        split: Split = "all",
        heldout_fraction: float = 0.15,
        template: str = COUNTDOWN_TEMPLATE,
        chat: bool = True,
    ) -> None:
        check_split(split, heldout_fraction)
        check_count("num_numbers", num_numbers, 2)
        check_count("max_number", max_number, 2)
        check_count("num_problems", num_problems, 1)
        check_template("template", template, ("numbers", "target"))
        self.path, self.num_problems, self.num_numbers, self.max_number = path, num_problems, num_numbers, max_number
        self.seed, self.split, self.heldout_fraction = seed, split, heldout_fraction
        self.template, self.chat = template, chat

    def problems(self) -> Iterator[Problem]:
        seen: set[str] = set()
        for numbers, target, solution in self._read() if self.path else self._generate():
            problem_id = f"{sorted(numbers)}={target}"
            if problem_id not in seen and (self.path or in_split(problem_id, self.split, self.heldout_fraction)):
                seen.add(problem_id)
                text = self.template.format(numbers=numbers, target=target)
                answer = {"numbers": numbers, "target": target}
                meta = {"solution": solution} if solution else {}
                yield Problem(problem_id, as_prompt(text, chat=self.chat), answer, meta, own_text=(text,))

    def _generate(self) -> Iterator[tuple[list[int], int, str]]:
        for index in range(self.num_problems):
            seed = derive_seed(self.seed, "countdown", index)
            yield Countdown.generate_solved(seed, self.num_numbers, self.max_number)

    def _read(self) -> Iterator[tuple[list[int], int, str]]:
        assert self.path is not None
        path = Path(self.path)
        if not path.is_file():
            raise ConfigError("path", self.path, "no such file: name a JSON-lines file with numbers and target")
        for number, line in enumerate(path.read_text(encoding="utf-8").strip().split("\n"), start=1):
            try:
                row = json.loads(line)
                yield [int(n) for n in row["numbers"]], int(row["target"]), ""
            except (ValueError, KeyError, TypeError) as error:
                raise ConfigError("path", self.path, f"line {number} is no countdown problem: {error!r}") from error


class CountdownReward(VerifiableReward):
    """Correct if the last ``<answer>…</answer>`` is an expression of the given numbers that equals the target.

    ``prompt.answer`` holds ``{numbers, target}``. An equation such as ``<answer>3 * 4 = 12</answer>`` is judged by its
    left side.

    Args:
        use_all: every number must be used exactly once; otherwise at most once.
        tagged: False takes the whole response as the expression.
    """

    pooled = False  # its parser bounds length and depth
    tells_bad_answers = True

    def __init__(
        self, use_all: bool = True, correct: float = 1.0, incorrect: float = -1.0, tagged: bool = True
    ) -> None:
        super().__init__(correct, incorrect)
        self.task, self.tagged = Countdown(use_all), tagged

    def verify(self, prompt: Prompt, completion: Completion) -> Verdict:
        numbers, target = self._problem(prompt)
        expression = completion.text
        if self.tagged:
            _, opening, rest = expression.rpartition("<answer>")
            expression, closing, _ = rest.partition("</answer>")
            if not opening or not closing:
                return Verdict(0.0, "")
        expression = expression.split("=")[0]
        right = self.task.verify(expression, numbers, target)
        return Verdict(right, "".join(expression[:200].split()))

    @staticmethod
    def _problem(prompt: Prompt) -> tuple[list[int], int]:
        """Numbers and target; raises RewardError unless they are integers, since nothing equals text or None."""
        answer = prompt.answer if isinstance(prompt.answer, Mapping) else {}
        numbers, target = answer.get("numbers"), answer.get("target")
        values = [*numbers, target] if isinstance(numbers, list | tuple) and numbers else [None]
        whole = [int(v) for v in values if isinstance(v, int | float) and not isinstance(v, bool) and v == v // 1]
        if len(whole) < len(values):
            found = f"{str(prompt.answer)[:100]!r} of prompt {prompt.id!r}"
            raise RewardError(f"CountdownReward needs an answer with whole numbers and target, and {found} is none")
        return whole[:-1], whole[-1]
