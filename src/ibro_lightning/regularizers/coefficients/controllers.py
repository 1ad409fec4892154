"""Coefficients that follow the policy's entropy, or the KL divergence from its reference."""

from __future__ import annotations

import math
from abc import abstractmethod

from ibro_lightning.errors import ConfigError, check_at_least, check_count, check_instance, is_number
from ibro_lightning.regularizers.coefficients.base import Coefficient
from ibro_lightning.regularizers.method import Method


class EntropyController(Coefficient):
    """A coefficient that follows the policy's entropy within two limits: subclasses say where to, by :meth:`move_to`.

    Args:
        start: first value.
        minimum, maximum: limits.
        state: numbers beside the coefficient that a resumed run needs.
    """

    measures = "entropy"

    def __init__(self, start: float, minimum: float, maximum: float, **state: float) -> None:
        check_at_least("start", start, 0)
        if not (is_number(minimum) and 0 <= minimum <= start):
            raise ConfigError("minimum", minimum, f"write a number between 0 and start ({start})")
        if not (is_number(maximum) and maximum >= start):
            raise ConfigError("maximum", maximum, f"write start ({start}) or more")
        super().__init__(coef=start, **state)
        self.start, self.minimum, self.maximum = start, minimum, maximum

    @property
    def value(self) -> float:
        return self.state["coef"]

    @property
    def bounds(self) -> tuple[float, float]:
        return self.minimum, self.maximum

    @abstractmethod
    def move(self, measured: float, samples: int) -> None:
        """Respond to the entropy, by :meth:`move_to`."""

    def move_to(self, target: float) -> None:
        """Take the value nearest to ``target`` within the limits."""
        self.state["coef"] = min(max(target, self.minimum), self.maximum)


class TargetEntropy(EntropyController):
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

    def __init__(self, target: float = 0.2, step: float = 0.005, start: float = 0.0, maximum: float = math.inf) -> None:
        for name, number in (("target", target), ("step", step)):
            check_at_least(name, number, 0)
        super().__init__(start, 0.0, maximum, active=1.0)
        self.target, self.step = target, step

    @property
    def value(self) -> float:
        return self.state["coef"] * self.state["active"]

    def move(self, measured: float, samples: int) -> None:
        self.move_to(self.state["coef"] + (self.step if measured < self.target else -self.step))
        self.state["active"] = float(measured <= self.target)


class EntropyBand(EntropyController):
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
        for name, number in (("proportional", proportional), ("integral", integral)):
            check_at_least(name, number, 0)
        super().__init__(start, minimum, maximum, sum=0.0)
        self.low, self.high = low, high
        self.proportional, self.integral = proportional, integral
        check_instance("raises_entropy", raises_entropy, bool)
        self.sign = 1.0 if raises_entropy else -1.0

    def move(self, measured: float, samples: int) -> None:
        error = self.sign * (max(self.low - measured, 0.0) - max(measured - self.high, 0.0))
        summed = self.state["sum"] + error
        target = self.start + self.proportional * error + self.integral * summed
        self.move_to(target)
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


class EntropySteps(EntropyController):
    """``λ ← clip(λ ∓ step, minimum, maximum)``: one step down while entropy is below its target, one up while above.

    Meant for the weight of what lowers entropy, such as the policy loss of right responses: the entropy-driven
    reweighting of arXiv 2511.05993, of which a note by others was seen; its step is theirs, start and limits are ours.

    Args:
        target: nats per token.
        step: how much λ moves per iteration.
        start: its first value.
        minimum: lower limit.
        maximum: upper limit.
    """

    method = Method(
        formula="λ one step down while H is below its target, one up while above, within limits",
        source="arXiv 2511.05993",
        certainty="note",
        recipe="weight: {class_path: EntropySteps, init_args: {target: 0.3, step: 0.05}}",
    )

    def __init__(
        self, target: float = 0.3, step: float = 0.05, start: float = 1.0, minimum: float = 0.0, maximum: float = 2.0
    ) -> None:
        for name, number in (("target", target), ("step", step)):
            check_at_least(name, number, 0)
        super().__init__(start, minimum, maximum)
        self.target, self.step = target, step

    def move(self, measured: float, samples: int) -> None:
        self.move_to(self.state["coef"] + self.step * ((measured > self.target) - (measured < self.target)))


class AdaptiveClip(Coefficient):
    """A ``clip_ratio_high`` that widens while entropy is below its target: the ratio is clipped to ``[1 − ε, 1/(1 − ε)
    + k]`` with ``k ← clip(k + step·sign(target − H), 0, maximum)``, so its value is ``1/(1 − ε) + k − 1``.

    The recipe of MAI-Thinking-1, as others report it; where k starts is ours. Its ε is that of the lower bound, too:
    write it as ``clip_ratio_low``. A loss with another one warns.

    Args:
        epsilon: ε.
        target: nats per token.
        step: how much k moves per iteration.
        maximum: the largest k.
        start: the first k.
    """

    method = Method(
        formula="1/(1 − ε) + k − 1, k ← clip(k + step·sign(target − H), 0, maximum)",
        source="MAI-Thinking-1",
        certainty="note",
        recipe="{clip_ratio_low: 0.6, "
        "clip_ratio_high: {class_path: AdaptiveClip, init_args: {epsilon: 0.6, target: 0.3, step: 0.25}}}",
    )
    measures = "entropy"
    only_for = "clip_ratio_high"

    def __init__(
        self, epsilon: float = 0.6, target: float = 0.3, step: float = 0.25, maximum: float = 2.5, start: float = 0.0
    ) -> None:
        if not (is_number(epsilon) and 0 < epsilon < 1):
            raise ConfigError("epsilon", epsilon, "write a number between 0 and 1, such as 0.6")
        for name, number in (("target", target), ("step", step), ("start", start)):
            check_at_least(name, number, 0)
        check_at_least("maximum", maximum, start)
        super().__init__(widening=start)
        self.epsilon, self.target, self.step, self.maximum = epsilon, target, step, maximum

    @property
    def value(self) -> float:
        return 1.0 / (1.0 - self.epsilon) + self.state["widening"] - 1.0

    @property
    def bounds(self) -> tuple[float, float]:
        narrowest = 1.0 / (1.0 - self.epsilon) - 1.0
        return narrowest, narrowest + self.maximum

    def move(self, measured: float, samples: int) -> None:
        moved = self.state["widening"] + self.step * ((measured < self.target) - (measured > self.target))
        self.state["widening"] = min(max(moved, 0.0), self.maximum)
