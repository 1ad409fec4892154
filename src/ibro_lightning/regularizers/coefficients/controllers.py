"""Controllers by the entropy of what is no entropy term: weights of the policy loss, clip ratios, and an anchor."""

from __future__ import annotations

import math

from ibro_lightning.errors import ConfigError, check_at_least, is_number
from ibro_lightning.regularizers.coefficients import Coefficient
from ibro_lightning.regularizers.method import Method


class EntropySteps(Coefficient):
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
    measures = "entropy"

    def __init__(
        self, target: float = 0.3, step: float = 0.05, start: float = 1.0, minimum: float = 0.0, maximum: float = 2.0
    ) -> None:
        for name, number in (("target", target), ("step", step), ("start", start)):
            check_at_least(name, number, 0)
        if not (is_number(minimum) and 0 <= minimum <= start):
            raise ConfigError("minimum", minimum, f"write a number between 0 and start ({start})")
        check_at_least("maximum", maximum, start)
        super().__init__(coef=start)
        self.target, self.step, self.minimum, self.maximum = target, step, minimum, maximum

    @property
    def value(self) -> float:
        return self.state["coef"]

    @property
    def bounds(self) -> tuple[float, float]:
        return self.minimum, self.maximum

    def move(self, measured: float, samples: int) -> None:
        moved = self.state["coef"] + self.step * ((measured > self.target) - (measured < self.target))
        self.state["coef"] = min(max(moved, self.minimum), self.maximum)


class AdaptiveClip(Coefficient):
    """A ``clip_ratio_high`` that widens while entropy is below its target: the ratio is clipped to ``[1 − ε, 1/(1 − ε)
    + k]`` with ``k ← clip(k + step·sign(target − H), 0, maximum)``, so its value is ``1/(1 − ε) + k − 1``.

    The recipe of MAI-Thinking-1, as others report it; where k starts is ours. Write ε as ``clip_ratio_low``, too.

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
        recipe="clip_ratio_high: {class_path: AdaptiveClip, init_args: {epsilon: 0.6, target: 0.3, step: 0.25}}",
    )
    measures = "entropy"

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


class Anchor(Coefficient):
    """A number that is measured once, in the run's first optimizer step, and then stays: 0 until :meth:`settle`."""

    def __init__(self) -> None:
        super().__init__(value=0.0, settled=0.0)

    @property
    def value(self) -> float:
        return self.state["value"]

    def settle(self, measured: float) -> None:
        """Stay at ``measured`` from now on, if it is finite and the first."""
        if not self.state["settled"] and math.isfinite(measured):
            self.state |= {"value": measured, "settled": 1.0}
