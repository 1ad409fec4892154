"""A number that may move during training, and the constant one.

:attr:`Coefficient.value` is used during an update. In every iteration, a coefficient first counts it and then moves by
the measured entropy or KL of the policy (nats per token): the entropy is measured before the update, the KL after it,
for the next one. The state is a few numbers and part of the checkpoint.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Literal

from ibro_lightning.errors import ConfigError, check_at_least


class TrackedNumber(ABC):
    """A number of a run, whose state is part of the checkpoint and whose value is a curve. Subclasses keep their state
    in :attr:`state`."""

    def __init__(self, **state: float) -> None:
        self.state: dict[str, float] = {"iterations": 0.0, **state}

    @property
    @abstractmethod
    def value(self) -> float:
        """The present number."""

    def start_iteration(self) -> None:
        """Count an iteration, before its first use of the value."""
        self.state["iterations"] += 1

    def state_dict(self) -> dict[str, float]:
        return dict(self.state)

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Resume from ``state``. If it is another class's, the common part resumes (all count the run's iterations),
        and the rest starts afresh."""
        self.state |= {name: number for name, number in state.items() if name in self.state}


class Coefficient(TrackedNumber):
    """A number ≥ 0 that a recipe can write in place of a plain one. It may follow the iteration or a measurement."""

    measures: Literal["entropy", "KL"] | None = None
    """The quantity that :meth:`move` needs; None for either."""
    follows_measurement: bool = True
    """Whether the value depends on what is measured. Where no coefficient does, an update need not score the whole
    rollout before its first step."""
    only_for: str | None = None
    """The setting that alone can take it; None for any."""

    @property
    def bounds(self) -> tuple[float, float] | None:
        """The least and the largest value that it can take; None: not known. A setting that allows only some values,
        such as a clip ratio, refuses a coefficient that could leave them."""
        return None

    def observe(self, measured: float, samples: int = 1) -> None:
        """Move by what was measured over ``samples`` responses. A number that is not finite moves nothing."""
        if math.isfinite(measured):
            self.move(measured, samples)

    def move(self, measured: float, samples: int) -> None:
        """Respond to a measurement."""


class Constant(Coefficient):
    """Always ``coef``; what a plain number in a recipe means."""

    follows_measurement = False

    def __init__(self, coef: float) -> None:
        super().__init__()
        check_at_least("coef", coef, 0)
        self.coef = coef

    @property
    def value(self) -> float:
        return self.coef

    @property
    def bounds(self) -> tuple[float, float]:
        return self.coef, self.coef


def moving(**numbers: Coefficient) -> dict[str, Coefficient]:
    """Those of a method's numbers that are not constant, by name: a constant needs neither state nor curve."""
    return {name: number for name, number in numbers.items() if not isinstance(number, Constant)}


def as_coefficient(coef: Coefficient | float, setting: str, measures: Literal["entropy", "KL"]) -> Coefficient:
    """The object for ``coef`` as written in a recipe.

    In signatures write ``Coefficient | float``, in this order: the parser reports the first member's error.

    Raises:
        ConfigError: naming ``setting``, for a number that is negative or not finite, or a coefficient that follows
            another quantity than ``measures`` or belongs to another setting.
    """
    if not isinstance(coef, Coefficient):
        check_at_least(setting, coef, 0)
        return Constant(coef)
    name = type(coef).__name__
    if coef.measures not in (None, measures):
        raise ConfigError(setting, name, f"it follows the {coef.measures}, but is given the {measures} here")
    if coef.only_for not in (None, setting):
        raise ConfigError(setting, name, f"its values are those of {coef.only_for}: write a number or another class")
    return coef
