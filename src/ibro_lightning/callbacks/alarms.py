"""Failures that show in the curves: entropy collapse and explosion, length collapse, entropy out of a band."""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn

from ibro_lightning.callbacks.metrics_log import MetricsLog
from ibro_lightning.errors import ConfigError, check_at_least, check_count, is_number
from ibro_lightning.runs.folder import callbacks_of

ENTROPY, LENGTH = "policy/entropy", "rollout/length"
LOW, HIGH = 0.1, 0.5
"""Nats per token. Above the first, nothing has collapsed, and below the second, the upper end of the paper's band,
nothing has exploded, however far the start is."""
ADVICE = {
    "entropy_collapse": (
        "samples become alike and nothing new is found: compare val/…/pass@k with avg@k, and see "
        "rollout/zero_variance_groups; against it: InformationBottleneck (0.005 in the paper), a higher "
        "clip_ratio_high, a lower learning_rate"
    ),
    "entropy_explosion": (
        "the entropy term outweighs the reward: see rollout/reward, update/regularizer and "
        "information/regularizer_gradient_share; lower model.regularizer.coef (the paper: 0.005 for IB, 0.001 for the "
        "naive bonus) or learning_rate"
    ),
    "length_collapse": (
        "in the paper it is the naive bonus that shortens responses: see rollout/length_right, length_wrong, reward, "
        "and some samples; lower model.regularizer.coef, and look at what the reward pays for short answers"
    ),
    "entropy_band": (
        "the band that was asked for: below it see rollout/zero_variance_groups, above it rollout/reward; "
        "model.regularizer.coef moves it"
    ),
}
UNITS = {ENTROPY: "nats per token", LENGTH: "tokens"}


@dataclass(frozen=True)
class Bounds:
    """When an alarm is raised, and when it is over: in between, it stays as it is."""

    curve: str
    low: float = -math.inf
    high: float = math.inf
    low_over: float = -math.inf
    high_over: float = math.inf

    def state(self, value: float, raised: bool) -> bool:
        if raised:
            return not self.low_over <= value <= self.high_over
        return not self.low <= value <= self.high


class Alarms(pl.Callback):
    """Recognises failures while training; a warning when one begins, and a curve ``alarm/…``, 1 as long as it lasts.

    What counts is the median of the last ``window`` iterations, which no single one can move far, against the median of
    the run's first ``window``. An alarm is over, and can be raised again, when half of the way back from its threshold
    to the start is made (on a log scale). The state is part of a checkpoint.

    Args:
        window: iterations of a median.
        entropy_collapse: raised where entropy (``policy/entropy``) is below this share of the start's, and below 0.1
            nats; null: never. The quick start ends near a quarter of its start, healthy: its accuracy still rises.
        entropy_explosion: raised where entropy is above this multiple of the start's, and above 0.5 nats, the upper end
            of the paper's band; null: never.
        length_collapse: raised where responses (``rollout/length``) are shorter than this share of the start's; null:
            never. A policy that learns to be brief halves its lengths rarely, and the line says how the reward moved.
        entropy_band: raised where entropy is out of these bounds, in nats per token; the paper's runs with IB stay
            in [0.3, 0.5]. null: none, since good values differ between tasks: the quick start's is around 0.1.
    """

    def __init__(
        self,
        window: int = 5,
        entropy_collapse: float | None = 0.1,
        entropy_explosion: float | None = 3.0,
        length_collapse: float | None = 0.5,
        entropy_band: tuple[float, float] | None = None,
    ) -> None:
        check_count("window", window, 1)
        for name, share in (("entropy_collapse", entropy_collapse), ("length_collapse", length_collapse)):
            if share is not None and not (is_number(share) and 0 < share < 1):
                raise ConfigError(name, share, "write a share of the start between 0 and 1, or null for none")
        if entropy_explosion is not None and not (is_number(entropy_explosion) and entropy_explosion > 1):
            raise ConfigError("entropy_explosion", entropy_explosion, "write a multiple above 1, or null for none")
        if entropy_band is not None:
            if len(entropy_band) != 2 or not all(map(is_number, entropy_band)) or entropy_band[0] >= entropy_band[1]:
                raise ConfigError("entropy_band", entropy_band, "write [low, high] in nats, or null for none")
            check_at_least("entropy_band[0]", entropy_band[0], 0)
        self.window, self.entropy_band = window, entropy_band
        self.entropy_collapse, self.entropy_explosion = entropy_collapse, entropy_explosion
        self.length_collapse = length_collapse
        self._forget()

    def _forget(self) -> None:
        self.iteration = 0
        self.raised: dict[str, bool] = {}
        self.first: dict[str, list[float]] = {}
        self.latest: dict[str, deque[float]] = {}

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage == TrainerFn.FITTING and next(iter(callbacks_of(trainer, MetricsLog)), None) is None:
            rank_zero_warn("Alarms does nothing: it needs the metrics of a MetricsLog, and the Trainer has none")

    def state_dict(self) -> dict[str, Any]:
        latest = {curve: list(values) for curve, values in self.latest.items()}
        first = {curve: list(values) for curve, values in self.first.items()}
        return {"iteration": self.iteration, "raised": dict(self.raised), "first": first, "latest": latest}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.iteration, self.raised = state_dict["iteration"], dict(state_dict["raised"])
        self.first = {curve: list(values) for curve, values in state_dict["first"].items()}
        self.latest = {curve: deque(values, self.window) for curve, values in state_dict["latest"].items()}

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.fit_loop.epoch_loop.total_batch_idx < 0:  # another run than that of an earlier fit
            self._forget()

    def on_metrics(self, iteration: int, metrics: Mapping[str, float]) -> dict[str, float]:
        """The curves ``alarm/…``, and a warning for each alarm that begins (:class:`.MetricsWatcher`)."""
        if iteration > self.iteration:  # not twice, if a Trainer has two that ask
            self.iteration = iteration
            for curve in (ENTROPY, LENGTH, "rollout/reward"):
                if math.isfinite(value := metrics.get(curve, math.nan)):
                    self._add(curve, value)
            for name, bounds in self._bounds().items():
                self._judge(name, bounds, iteration)
        return {f"alarm/{name}": float(raised) for name, raised in self.raised.items()}

    def _add(self, curve: str, value: float) -> None:
        if len(first := self.first.setdefault(curve, [])) < self.window:
            first.append(value)
        self.latest.setdefault(curve, deque(maxlen=self.window)).append(value)

    def _median(self, curve: str) -> float:
        return statistics.median(self.latest[curve])

    def _start(self, curve: str) -> float:
        return statistics.median(self.first[curve])

    def _bounds(self) -> dict[str, Bounds]:
        """Of each alarm whose curve has a median yet."""
        filled = {curve for curve, values in self.first.items() if len(values) == self.window}
        bounds: dict[str, Bounds] = {}
        if ENTROPY in filled:
            start = self._start(ENTROPY)
            if (share := self.entropy_collapse) is not None:
                low = min(share * start, LOW)
                bounds["entropy_collapse"] = Bounds(ENTROPY, low=low, low_over=low / math.sqrt(share))
            if (multiple := self.entropy_explosion) is not None:
                high = max(multiple * start, HIGH)
                bounds["entropy_explosion"] = Bounds(ENTROPY, high=high, high_over=high / math.sqrt(multiple))
            if self.entropy_band is not None:
                low, high = self.entropy_band
                inner = (high - low) / 10
                bounds["entropy_band"] = Bounds(ENTROPY, low, high, low + inner, high - inner)
        if LENGTH in filled and (share := self.length_collapse) is not None:
            low = share * self._start(LENGTH)
            bounds["length_collapse"] = Bounds(LENGTH, low=low, low_over=low / math.sqrt(share))
        return bounds

    def _judge(self, name: str, bounds: Bounds, iteration: int) -> None:
        before, median = self.raised.get(name, False), self._median(bounds.curve)
        self.raised[name] = bounds.state(median, before)
        if self.raised[name] and not before:
            rank_zero_warn(f"iteration {iteration}: {self._line(name, bounds.curve, median)}")

    def _line(self, name: str, curve: str, median: float) -> str:
        """What has happened, and what to look at."""
        kind, start = name.replace("_", " "), self._start(curve)
        if name == "entropy_band":
            assert self.entropy_band is not None
            kind = f"entropy out of [{self.entropy_band[0]:g}, {self.entropy_band[1]:g}]"
        line = f"{kind}: {median:.3g} {UNITS[curve]}, {start:.3g} at the start (medians of {self.window})"
        if name == "length_collapse" and "rollout/reward" in self.latest:
            line += f", reward {self._start('rollout/reward'):.3g} -> {self._median('rollout/reward'):.3g}"
        return f"{line}: {ADVICE[name]}"
