"""Demonstrations made of any source's problems and their solutions."""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import cached_property

from ibro_lightning.errors import ConfigError, check_instance
from ibro_lightning.sources.base import DemonstrationSource, PromptSource
from ibro_lightning.types import Message, Problem


class SolvedProblems(DemonstrationSource):
    """The problems of a source, each with its own solution as the response: a warm start for a policy from scratch.

    Args:
        source: the problems, of the training split: none of them may be evaluated on.
        response: template of the solution, a format string with ``{answer}`` and ``{meta}`` of the
            :class:`~ibro_lightning.types.Problem`, e.g. ``{meta[solution]}`` or ``{answer[entry][answer]}``.
    """

    def __init__(self, source: PromptSource, response: str = "{answer}") -> None:
        check_instance("source", source, PromptSource)
        if "{" not in response:
            raise ConfigError("response", response, "write a template with the solution, such as {answer}")
        self.source, self.response = source, response

    @cached_property
    def problems(self) -> tuple[Problem, ...]:
        if not (problems := tuple(self.source.problems())):
            raise ConfigError("source", type(self.source).__name__, "has no problems")
        return problems

    def demonstration(self, seed: int) -> tuple[str | Sequence[Message], str]:
        problem = random.Random(seed).choice(self.problems)
        try:
            return problem.prompt, self.response.format(answer=problem.answer, meta=problem.meta)
        except (KeyError, IndexError, AttributeError, TypeError, ValueError) as error:
            given = f"cannot be filled in for problem {problem.id!r} ({error!r})"
            raise ConfigError(
                "response", self.response, f"{given}: use {{answer}} and {{meta}} of the source"
            ) from error

    def may_show(self, prompt: str) -> bool:
        return prompt in self._prompts

    @cached_property
    def _prompts(self) -> frozenset[str]:
        """Raw prompts; of a chat only the template knows the text, so that overlaps of chats are not found."""
        return frozenset(problem.prompt for problem in self.problems if isinstance(problem.prompt, str))
