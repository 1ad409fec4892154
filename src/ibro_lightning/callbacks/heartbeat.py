"""Reports an iteration that takes unusually long, with the phase in which it is slow or hangs."""

from __future__ import annotations

import statistics
import threading
import time
from collections import deque
from typing import Any

import lightning.pytorch as pl

from ibro_lightning.errors import check_at_least
from ibro_lightning.guards.printing import tell
from ibro_lightning.timing import running


class Heartbeat(pl.Callback):
    """Prints on the first rank which phase is running, and for how long, if an iteration takes more than ``factor``
    times as long as the earlier ones; again after twice the time, and so on.

    Args:
        factor: multiple of the median duration of the last 50 iterations; 0 switches it off.
        at_least_s: minimum time in seconds before a line, however short iterations are.
        first_s: seconds after which the first iteration, which cannot be compared with others, gets a line.
    """

    def __init__(self, factor: float = 3.0, at_least_s: float = 60.0, first_s: float = 600.0) -> None:
        for name, value in (("factor", factor), ("at_least_s", at_least_s), ("first_s", first_s)):
            check_at_least(name, value, 0)
        self.factor, self.at_least_s, self.first_s = factor, at_least_s, first_s
        self._durations: deque[float] = deque(maxlen=50)
        self._began = 0.0
        self._iteration = 1
        self._evaluating: float | None = None
        self._stopped = threading.Event()
        self._thread: threading.Thread | None = None

    @property
    def patience_s(self) -> float:
        """Seconds after which an iteration is unusually long."""
        if not self._durations:
            return self.first_s
        return max(self.at_least_s, self.factor * statistics.median(self._durations))

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not self.factor or not trainer.is_global_zero:
            return
        self._durations.clear()
        self._begin(trainer)
        self._stopped.clear()
        self._thread = threading.Thread(target=self._watch, name="heartbeat", daemon=True)
        self._thread.start()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._durations.append(time.monotonic() - self._began)
        self._begin(trainer)

    # The time of an evaluation does not count as part of an iteration.

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._evaluating = time.monotonic()

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._evaluating is not None:
            self._began += time.monotonic() - self._evaluating
        self._evaluating = None

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._stop()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._stop()

    def _begin(self, trainer: pl.Trainer) -> None:
        self._began = time.monotonic()
        self._iteration = trainer.fit_loop.epoch_loop.total_batch_idx + 2

    def _stop(self) -> None:
        self._stopped.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _watch(self) -> None:
        reported, due = 0, 0.0
        while not self._stopped.wait(min(1.0, max(0.01, self.patience_s / 10))):
            iteration, spent = self._iteration, time.monotonic() - self._began
            if iteration != reported:
                due = self.patience_s
            if self._evaluating is None and spent > due:
                reported, due = iteration, 2 * spent
                tell(self.describe(iteration, spent))

    def describe(self, iteration: int, spent: float) -> str:
        """The line for an iteration that has been running for ``spent`` seconds."""
        phase = running()
        doing = f"in {phase[0]} for {phase[1]:.0f} s" if phase else "between phases"
        if not self._durations:
            return f"iteration {iteration} (the first here) has been running for {spent:.0f} s, {doing}"
        usual = statistics.median(self._durations)
        return f"iteration {iteration} has been running for {spent:.0f} s, {doing}; {usual:.1f} s is usual"
