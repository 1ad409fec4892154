"""Coefficients of an entropy term or of a KL penalty, constant or changing during training.

Each is one small class: :attr:`Coefficient.value` is used during an update. In every iteration, a coefficient first
counts it and then moves by the measured entropy or KL of the policy (nats per token): that of an entropy term before
the update, that of a KL penalty after it, for the next one. The state is a few numbers and part of the checkpoint.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

from ibro_lightning.errors import ConfigError, check_at_least, check_count, check_instance, is_number
from ibro_lightning.regularizers.method import Method


class Coefficient(ABC):
    """A number ≥ 0 that may follow the iteration or a measurement. Subclasses keep their state in :attr:`state`."""

    measures: Literal["entropy", "KL"] | None = None
    """The quantity that :meth:`move` needs; None for either."""

    def __init__(self, **state: float) -> None:
        self.state: dict[str, float] = {"iterations": 0.0, **state}

    @property
    @abstractmethod
    def value(self) -> float:
        """The present factor of the term."""

    @property
    def bounds(self) -> tuple[float, float] | None:
        """The least and the largest value that it can take; None: not known. A setting that allows only some values,
        such as a clip ratio, refuses a coefficient that could leave them."""
        return None

    def start_iteration(self) -> None:
        """Count an iteration, before its first use of the value."""
        self.state["iterations"] += 1

    def observe(self, measured: float, samples: int = 1) -> None:
        """Move by what was measured over ``samples`` responses. A number that is not finite moves nothing."""
        if math.isfinite(measured):
            self.move(measured, samples)

    def move(self, measured: float, samples: int) -> None:  # noqa: B027  schedules have nothing to do here
        """Respond to a measurement."""

    def state_dict(self) -> dict[str, float]:
        return dict(self.state)

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Resume from ``state``. If it is another class's, the common part resumes (all count the run's iterations),
        and the rest starts afresh."""
        self.state |= {name: number for name, number in state.items() if name in self.state}


class Constant(Coefficient):
    """Always ``coef``; what a plain number in a recipe means."""

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


class Schedule(Coefficient):
    """From one value in the first iteration to another, then constant.

    Args:
        start: first value.
        end: last value.
        iterations: from the first value to the last.
    """

    def __init__(self, start: float, end: float, iterations: int) -> None:
        super().__init__()
        check_at_least("start", start, 0)
        check_at_least("end", end, 0)
        check_count("iterations", iterations, 1)
        self.start, self.end, self.iterations = start, end, iterations

    @property
    def progress(self) -> float:
        """0 in the first iteration, 1 after ``iterations``."""
        return min(1.0, max(0.0, self.state["iterations"] - 1) / self.iterations)

    @property
    def bounds(self) -> tuple[float, float]:
        return min(self.start, self.end), max(self.start, self.end)


class Linear(Schedule):
    """A straight line from ``start`` to ``end``."""

    @property
    def value(self) -> float:
        return self.start + (self.end - self.start) * self.progress


class Cosine(Schedule):
    """Half a cosine from ``start`` to ``end``: flat at both."""

    @property
    def value(self) -> float:
        return self.end + (self.start - self.end) * 0.5 * (1.0 + math.cos(math.pi * self.progress))


class Stages(Coefficient):
    """One value after another, each from a given iteration on.

    Args:
        values: of the stages.
        starts: the first iteration (from 1) of each stage but the first, in order: one less than ``values``.
    """

    def __init__(self, values: list[float], starts: list[int]) -> None:
        super().__init__()
        if isinstance(values, str) or not isinstance(values, Sequence) or not values:
            raise ConfigError("values", values, "write a list of numbers, such as [1.0, 0.5]")
        for value in values:
            check_at_least("values", value, 0)
        if isinstance(starts, str) or not isinstance(starts, Sequence) or len(starts) != len(values) - 1:
            raise ConfigError("starts", starts, f"write the first iterations of stages 2 to {len(values)} as a list")
        for start in starts:
            check_count("starts", start, 2)
        if any(later <= earlier for earlier, later in pairwise(starts)):
            raise ConfigError("starts", starts, "write iterations that increase, such as [100, 200]")
        self.values, self.starts = list(values), list(starts)

    @property
    def value(self) -> float:
        return self.values[bisect_right(self.starts, self.state["iterations"])]

    @property
    def bounds(self) -> tuple[float, float]:
        return min(self.values), max(self.values)


class TargetEntropy(Coefficient):
    """Skywork-OR1's controller (arXiv 2505.22312): one step up while entropy is below its target, otherwise one down;
    the term is active only while entropy is at or below the target.

    Meant for a term that raises entropy (``EntropyBonus``). The entropy is that of the policy that sampled the rollout.

    Args:
        target: nats per token.
        step: how much the coefficient moves per iteration.
        start: its first value.
        maximum: upper limit.
    """

    method = Method(
        formula="α one step up while H is below its target, one down while above; active while H ≤ target",
        source="arXiv 2505.22312",
        certainty="paper",
        recipe="coef: {class_path: TargetEntropy, init_args: {target: 0.2, step: 0.005}}",
    )
    measures = "entropy"

    def __init__(self, target: float = 0.2, step: float = 0.005, start: float = 0.0, maximum: float = math.inf) -> None:
        for name, number in (("target", target), ("step", step), ("start", start)):
            check_at_least(name, number, 0)
        if not (is_number(maximum) and maximum >= start):
            raise ConfigError("maximum", maximum, f"write start ({start}) or more")
        super().__init__(coef=start, active=1.0)
        self.target, self.step, self.maximum = target, step, maximum

    @property
    def value(self) -> float:
        return self.state["coef"] * self.state["active"]

    @property
    def bounds(self) -> tuple[float, float]:
        return 0.0, self.maximum

    def move(self, measured: float, samples: int) -> None:
        moved = self.state["coef"] + (self.step if measured < self.target else -self.step)
        self.state["coef"] = min(max(moved, 0.0), self.maximum)
        self.state["active"] = float(measured <= self.target)


class EntropyBand(Coefficient):
    """A proportional-integral controller that keeps entropy between two bounds; inside them the integral holds.

    ``coef = start + kp·e + ki·Σe``, cut to [minimum, maximum], with ``e`` how far entropy is below ``low`` (positive)
    or above ``high`` (negative), in nats; with ``raises_entropy: false``, ``e`` has the other sign. While the
    coefficient is at a limit, errors that push further against it are not summed (anti-windup).

    Args:
        low: lower end of the band, nats per token.
        high: its upper end.
        proportional: gain, coefficient per nat.
        integral: gain, coefficient per nat and iteration.
        start: the initial coefficient inside the band.
        maximum: upper limit.
        minimum: lower limit; a clip ratio needs one above 0.
        raises_entropy: whether what the coefficient multiplies raises entropy; False for what lowers it, such as the
            policy loss of right responses.
    """

    method = Method(
        formula="start + kp·e + ki·Σe, e how far H is out of a band; anti-windup",
        source="–",
        certainty="ours",
        recipe="coef: {class_path: EntropyBand, init_args: {low: 0.1, high: 0.3}}",
    )
    measures = "entropy"

    def __init__(
        self,
        low: float = 0.1,
        high: float = 0.3,
        proportional: float = 0.01,
        integral: float = 0.001,
        start: float = 0.0,
        maximum: float = 1.0,
        minimum: float = 0.0,
        raises_entropy: bool = True,
    ) -> None:
        check_at_least("high", high, 0)
        if not (is_number(low) and 0 <= low <= high):
            raise ConfigError("low", low, f"write a number between 0 and high ({high})")
        for name, number in (("proportional", proportional), ("integral", integral), ("start", start)):
            check_at_least(name, number, 0)
        check_at_least("maximum", maximum, start)
        if not (is_number(minimum) and 0 <= minimum <= start):
            raise ConfigError("minimum", minimum, f"write a number between 0 and start ({start})")
        super().__init__(coef=start, sum=0.0)
        self.low, self.high, self.start, self.minimum, self.maximum = low, high, start, minimum, maximum
        self.proportional, self.integral = proportional, integral
        check_instance("raises_entropy", raises_entropy, bool)
        self.sign = 1.0 if raises_entropy else -1.0

    @property
    def value(self) -> float:
        return self.state["coef"]

    @property
    def bounds(self) -> tuple[float, float]:
        return self.minimum, self.maximum

    def move(self, measured: float, samples: int) -> None:
        error = self.sign * (max(self.low - measured, 0.0) - max(measured - self.high, 0.0))
        summed = self.state["sum"] + error
        target = self.start + self.proportional * error + self.integral * summed
        self.state["coef"] = min(max(target, self.minimum), self.maximum)
        pushes_against_limit = (target > self.maximum and error > 0) or (target < self.minimum and error < 0)
        if not pushes_against_limit:
            self.state["sum"] = summed


class AdaptiveKL(Coefficient):
    """``β ← β·(1 + clip(KL/target − 1, ±0.2)·n/horizon)`` (arXiv 1909.08593, section 2.2).

    Args:
        start: first β.
        target: KL per token, nats.
        horizon: responses over which β may change by about 20 %.
    """

    method = Method(
        formula="β ← β·(1 + clip(KL/target − 1, ±0.2)·n/horizon)",
        source="arXiv 1909.08593",
        certainty="paper",
        recipe="coef: {class_path: AdaptiveKL, init_args: {start: 0.001, target: 0.01, horizon: 10000}}",
    )
    measures = "KL"

    def __init__(self, start: float = 0.001, target: float = 0.01, horizon: int = 10_000) -> None:
        if not (is_number(start) and 0 < start < math.inf):
            raise ConfigError("start", start, "write a positive number: 0 would stay 0")
        check_count("horizon", horizon, 1)
        if not (is_number(target) and 0 < target < math.inf):
            raise ConfigError("target", target, "write a positive number of nats per token")
        super().__init__(coef=start)
        self.target, self.horizon = target, horizon

    @property
    def value(self) -> float:
        return self.state["coef"]

    def move(self, measured: float, samples: int) -> None:
        error = min(max(measured / self.target - 1.0, -0.2), 0.2)
        # Capped at the horizon: otherwise the factor could reach 0, where it would stay.
        self.state["coef"] *= 1.0 + error * min(samples / self.horizon, 1.0)


def as_coefficient(coef: Coefficient | float, setting: str, measures: Literal["entropy", "KL"]) -> Coefficient:
    """The object for ``coef`` as written in a recipe.

    In signatures write ``Coefficient | float``, in this order: the parser reports the first member's error.

    Raises:
        ConfigError: naming ``setting``, for a number that is negative or not finite, or a controller of another
            quantity than ``measures``.
    """
    if not isinstance(coef, Coefficient):
        check_at_least(setting, coef, 0)
        return Constant(coef)
    if coef.measures not in (None, measures):
        name = type(coef).__name__
        raise ConfigError(setting, name, f"it follows the {coef.measures}, but is given the {measures} here")
    return coef
