"""The interfaces of prompt and demonstration sources."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from string import Formatter
from typing import Any

from ibro_lightning.errors import ConfigError
from ibro_lightning.types import Message, Problem


class PromptSource(ABC):
    """A fixed list of problems.

    A custom source implements :meth:`problems`::

        class Squares(PromptSource):
            def problems(self):
                for n in range(100):
                    yield Problem(id=str(n), prompt=f"What is {n} squared?", answer=n * n)
    """

    weights: Mapping[str, float] | None = None
    """Sampling weights by :attr:`Problem.part`, summing to 1; None draws uniformly from all problems."""

    @abstractmethod
    def problems(self) -> Iterable[Problem]:
        """All problems, in a fixed order, with unique ids. The datamodule shuffles."""

    def first_problems(self, count: int) -> Iterable[Problem]:
        """The first ``count`` problems, or the first ``count`` of each part of a mixture; used by a dry run."""
        return islice(self.problems(), count)


def as_prompt(text: str, *, chat: bool, system: str | None = None) -> str | list[Mapping[str, str]]:
    """``text`` as messages for the chat template, or as raw text."""
    if not chat:
        return text if system is None else f"{system}\n\n{text}"
    messages: list[Mapping[str, str]] = [{"role": "user", "content": text}]
    return [{"role": "system", "content": system}, *messages] if system is not None else messages


def own_words(template: str, *, chat: bool, system: str | None = None) -> tuple[str, ...]:
    """The texts that a recipe contributes to the result of :func:`as_prompt`: its system message, and what precedes and
    follows the field of ``template``. Used as :attr:`Problem.own_text <ibro_lightning.types.Problem.own_text>`."""
    literals = [""]
    for text, name, _, _ in Formatter().parse(template):
        literals[-1] += text
        literals += [""] if name is not None else []
    before, after = literals[0], literals[-1]
    if system is None:
        return before, after
    return (system, before, after) if chat else (f"{system}\n\n{before}", after)


def check_template(setting: str, template: str, names: tuple[str, ...]) -> None:
    """Raise :class:`ConfigError` unless the fields of ``template`` are exactly ``names``."""
    values: dict[str, Any] = {name: f"<{name}>" for name in names}
    try:
        text = template.format(**values)
    except (KeyError, IndexError, ValueError) as error:
        remedy = f"use {', '.join(f'{{{name}}}' for name in names)}; write {{{{ for {{"
        raise ConfigError(setting, template, f"cannot be filled in ({error!r}): {remedy}") from error
    if missing := [name for name in names if f"<{name}>" not in text]:
        raise ConfigError(setting, template, f"must contain {{{missing[0]}}}")


def check_problem(problem: object, setting: str) -> None:
    """Raise :class:`ConfigError` unless a source has yielded a :class:`Problem`."""
    if not isinstance(problem, Problem):
        raise ConfigError(setting, type(problem).__name__, "a source yields ibro_lightning.types.Problem, nothing else")


class DemonstrationSource(ABC):
    """An endless supply of worked examples."""

    @abstractmethod
    def demonstration(self, seed: int) -> tuple[str | Sequence[Message], str]:
        """``(prompt, response)``, a function of ``seed`` alone. The prompt is raw text, or messages for the policy's
        chat template; EOS is appended to the response unless it ends with it."""

    def may_show(self, prompt: str) -> bool:
        """Whether ``prompt`` may occur among the demonstrations and must not be evaluated on; False if unknown."""
        return False
