"""Where problems come from. A source of one's own is one class with one method."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ibro_lightning.errors import ConfigError, check_at_least
from ibro_lightning.seeding import derive_seed
from ibro_lightning.tasks import Countdown, NumberPath, Split, in_split
from ibro_lightning.types import Problem

COUNTDOWN_TEMPLATE = (
    "Use the numbers {numbers} and the operations + - * / to make an expression that equals {target}. "
    "Use every number exactly once. Think step by step, then write the expression as <answer>expression</answer>."
)


class PromptSource(ABC):
    """A fixed list of problems::

    class Squares(PromptSource):
        def problems(self):
            for n in range(100):
                yield Problem(id=str(n), prompt=f"What is {n} squared?", answer=n * n)
    """

    weights: Mapping[str, float] | None = None
    """Shares of the draws by :attr:`Problem.part <ibro_lightning.responses.Problem.part>`, summing to 1; None draws
    from all problems alike."""

    @abstractmethod
    def problems(self) -> Iterable[Problem]:
        """All of them, in a fixed order, with unique ids. The datamodule shuffles."""


class NumberPathSource(PromptSource):
    """All number-path problems of a difficulty (see :mod:`ibro_lightning.tasks.number_path`).

    ``meta`` holds the shortest path's length (``distance``) and one such path (``solution``), for hindsight prompts.

    Args:
        task: the rules.
        split: which side of the held-out split; training takes "train", evaluation "heldout".
        min_distance, max_distance: difficulty, as the number of moves of the shortest path.
        heldout_fraction: share of problems that are held out, by a hash of the problem.
    """

    def __init__(
        self,
        task: NumberPath | None = None,
        split: Split = "train",
        min_distance: int = 2,
        max_distance: int = 8,
        heldout_fraction: float = 0.15,
    ) -> None:
        if not 1 <= min_distance <= max_distance:
            raise ConfigError("source.min_distance", min_distance, f"write 1 up to max_distance ({max_distance})")
        self.task = task or NumberPath()
        self.split, self.heldout_fraction = split, heldout_fraction
        self.min_distance, self.max_distance = min_distance, max_distance

    def problems(self) -> Iterator[Problem]:
        for (start, target), distance in sorted(self.task.distances.items()):
            prompt = self.task.prompt(start, target)
            if self.min_distance <= distance <= self.max_distance and in_split(
                prompt, self.split, self.heldout_fraction
            ):
                answer = {"start": start, "target": target, "size": self.task.size, "moves": list(self.task.moves)}
                meta = {"distance": distance, "solution": self.task.solution(start, target)}
                yield Problem(id=prompt, prompt=prompt, answer=answer, meta=meta)


class CountdownSource(PromptSource):
    """Countdown problems, generated or from a JSON-lines file with ``numbers`` and ``target``.

    Args:
        path: the file; None generates problems.
        num_problems, num_numbers, max_number, seed: what is generated. Every problem has a solution.
        split, heldout_fraction: generated problems are split by a hash of numbers and target; a file is taken whole.
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
        check_at_least("source.num_numbers", num_numbers, 2)
        check_at_least("source.max_number", max_number, 2)
        check_at_least("source.num_problems", num_problems, 1)
        check_template("source.template", template, ("numbers", "target"))
        self.path, self.num_problems, self.num_numbers, self.max_number = path, num_problems, num_numbers, max_number
        self.seed, self.split, self.heldout_fraction = seed, split, heldout_fraction
        self.template, self.chat = template, chat

    def problems(self) -> Iterator[Problem]:
        seen: set[str] = set()
        for numbers, target in self._read() if self.path else self._generate():
            problem_id = f"{sorted(numbers)}={target}"
            if problem_id not in seen and (self.path or in_split(problem_id, self.split, self.heldout_fraction)):
                seen.add(problem_id)
                text = self.template.format(numbers=numbers, target=target)
                yield Problem(problem_id, as_prompt(text, chat=self.chat), {"numbers": numbers, "target": target})

    def _generate(self) -> Iterator[tuple[list[int], int]]:
        for index in range(self.num_problems):
            yield Countdown.generate(derive_seed(self.seed, "countdown", index), self.num_numbers, self.max_number)

    def _read(self) -> Iterator[tuple[list[int], int]]:
        assert self.path is not None
        path = Path(self.path)
        if not path.is_file():
            raise ConfigError("source.path", self.path, "no such file: name a JSON-lines file with numbers and target")
        for number, line in enumerate(path.read_text(encoding="utf-8").strip().split("\n"), start=1):
            try:
                row = json.loads(line)
                yield [int(n) for n in row["numbers"]], int(row["target"])
            except (ValueError, KeyError, TypeError) as error:
                raise ConfigError(
                    "source.path", self.path, f"line {number} is no countdown problem: {error!r}"
                ) from error


class SumsSource(PromptSource):
    """Every sum of two numbers with a given number of digits: the smallest task for a chat model.

    Args:
        digits: of each number; 1 gives the 100 sums 0 + 0 … 9 + 9.
        template: with ``{a}`` and ``{b}``.
        split, heldout_fraction: by a hash of the sum.
        chat: wrap the prompt as a user message for the model's chat template.
    """

    def __init__(
        self,
        digits: int = 1,
        template: str = "What is {a} + {b}? Answer with the number only.",
        split: Split = "all",
        heldout_fraction: float = 0.2,
        chat: bool = True,
    ) -> None:
        if not 1 <= digits <= 3:
            raise ConfigError("source.digits", digits, "write 1, 2 or 3")
        check_template("source.template", template, ("a", "b"))
        self.numbers = range(0 if digits == 1 else 10 ** (digits - 1), 10**digits)
        self.template, self.split, self.heldout_fraction, self.chat = template, split, heldout_fraction, chat

    def problems(self) -> Iterator[Problem]:
        for a in self.numbers:
            for b in self.numbers:
                if in_split(f"{a}+{b}", self.split, self.heldout_fraction):
                    text = self.template.format(a=a, b=b)
                    yield Problem(f"{a}+{b}", as_prompt(text, chat=self.chat), str(a + b))


def as_prompt(text: str, *, chat: bool, system: str | None = None) -> str | list[Mapping[str, str]]:
    """Raw text, or messages for the chat template."""
    if not chat:
        return text if system is None else f"{system}\n\n{text}"
    messages: list[Mapping[str, str]] = [{"role": "user", "content": text}]
    return [{"role": "system", "content": system}, *messages] if system is not None else messages


def check_template(setting: str, template: str, names: tuple[str, ...]) -> None:
    """Raise unless ``template`` can be formatted with exactly these names and uses each of them."""
    values: dict[str, Any] = {name: f"<{name}>" for name in names}
    try:
        text = template.format(**values)
    except (KeyError, IndexError, ValueError) as error:
        raise ConfigError(
            setting,
            template,
            f"cannot be filled in ({error!r}): use {', '.join(f'{{{n}}}' for n in names)}; write {{{{ for {{",
        ) from error
    if missing := [name for name in names if f"<{name}>" not in text]:
        raise ConfigError(setting, template, f"must contain {{{missing[0]}}}")
