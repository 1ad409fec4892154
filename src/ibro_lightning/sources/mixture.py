"""Mixtures of prompt sources, sampled by weight."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice

from ibro_lightning.errors import ConfigError, check_instance, is_number
from ibro_lightning.sources.base import PromptSource, check_problem
from ibro_lightning.sources.curriculum import Curriculum
from ibro_lightning.types import Problem


@dataclass(frozen=True)
class MixturePart:
    """One source of a mixture.

    Args:
        source: its problems.
        weight: relative sampling weight, independent of the number of problems.
    """

    source: PromptSource
    weight: float = 1.0

    def __post_init__(self) -> None:
        check_instance("source", self.source, PromptSource)
        if not (is_number(self.weight) and 0 < self.weight < math.inf):
            raise ConfigError("weight", self.weight, "write a finite number above 0")


class MixtureSource(PromptSource):
    """Samples from several sources by weight::

        source:
          class_path: MixtureSource
          init_args:
            parts:
              math: {weight: 3, source: {class_path: DatasetSource, init_args: {path: math.jsonl}}}
              sums: {weight: 1, source: {class_path: SumsSource}}

    Training draws three of four prompts from ``math``, and each part is shuffled and repeated independently. Ids are
    ``part/id``. :class:`~ibro_lightning.rewards.RewardByPart` uses a separate reward per part. An evaluation set
    contains every problem once, regardless of weights.

    Args:
        parts: by name (letters, digits, ``_`` and ``-``).
    """

    def __init__(self, parts: dict[str, MixturePart]) -> None:
        if not parts:
            raise ConfigError("parts", "{}", "name at least one part")
        for name, part in parts.items():
            if not re.fullmatch(r"[\w-]+", name):
                raise ConfigError("parts", name, "name parts with letters, digits, '_' and '-' only")
            check_instance(f"parts.{name}", part, MixturePart)
            if isinstance(part.source, MixtureSource):
                remedy = "mixtures cannot be nested: write its parts here"
                raise ConfigError(f"parts.{name}.source", "MixtureSource", remedy)
            if isinstance(part.source, Curriculum):
                remedy = "a curriculum is around the mixture: write the mixture as its source"
                raise ConfigError(f"parts.{name}.source", type(part.source).__name__, remedy)
        self.parts = dict(parts)
        total = math.fsum(part.weight for part in parts.values())
        self.weights = {name: part.weight / total for name, part in parts.items()}

    def problems(self) -> Iterator[Problem]:
        for name, part in self.parts.items():
            for problem in part.source.problems():
                check_problem(problem, f"parts.{name}.source")
                if problem.part:
                    remedy = f"its problem {problem.id!r} is part of a mixture already: mixtures cannot be nested"
                    raise ConfigError(f"parts.{name}.source", problem.part, remedy)
                yield replace(problem, id=f"{name}/{problem.id}", part=name)

    def first_problems(self, count: int) -> Iterator[Problem]:
        for name, part in self.parts.items():
            yield from islice(MixtureSource({name: part}).problems(), count)
