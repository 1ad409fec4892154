"""One progress bar for the whole run, in RL iterations."""

from __future__ import annotations

import sys
import time
from contextlib import suppress
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ProgressBar
from tqdm import tqdm

from ibro_lightning.callbacks.metrics_log import MetricsLog
from ibro_lightning.errors import check_count
from ibro_lightning.guards.printing import is_terminal
from ibro_lightning.runs.folder import callbacks_of

SHOWN = {
    "rollout/reward": "reward",
    "rollout/accuracy": "accuracy",
    "policy/entropy": "entropy",
    "rollout/length": "length",
    "sft/loss": "loss",
}


class IterationProgress(ProgressBar):
    """Shows reward, accuracy, entropy and length beside a bar, or in plain lines where there is no terminal.

    Args:
        line_every: batches per line without a terminal; 0 means about 20 lines per run.
    """

    def __init__(self, line_every: int = 0) -> None:
        super().__init__()
        check_count("line_every", line_every, 0)
        self.line_every = line_every
        self._enabled = True
        self._bar: tqdm[Any] | None = None
        self._total = self._done = 0
        self._started = 0.0
        self._metrics = MetricsLog()

    def disable(self) -> None:
        self._enabled = False

    def enable(self) -> None:
        self._enabled = True

    def print(self, *args: Any, sep: str = " ", **kwargs: Any) -> None:
        if self._enabled and sys.stdout is not None:
            with suppress(OSError, ValueError):  # a closed stream
                tqdm.write(sep.join(str(arg) for arg in args))
                sys.stdout.flush()

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        epochs = trainer.max_epochs if trainer.max_epochs is not None else -1
        batches = int(trainer.num_training_batches)
        self._total = max(0, epochs) * batches
        self._done = trainer.current_epoch * batches
        self._started = time.perf_counter()
        # The two callbacks share one measurement, which the first of them makes.
        self._metrics = next(iter(callbacks_of(trainer, MetricsLog)), MetricsLog())
        self._metrics.on_train_start(trainer, pl_module)
        if self._enabled and is_terminal(sys.stderr):
            self._bar = tqdm(total=self._total or None, initial=self._done, desc="training", dynamic_ncols=True)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._done += 1
        metrics = self._metrics.measure(trainer, outputs, batch)
        shown = {short: f"{metrics[name]:.3g}" for name, short in SHOWN.items() if name in metrics}
        if self._bar is not None:
            self._bar.set_postfix(shown, refresh=False)
            self._bar.update()
        elif self._enabled and self._done % (self.line_every or max(1, self._total // 20)) == 0:
            fields = "  ".join(f"{name} {value:>6}" for name, value in shown.items())
            done = f"{self._done:>5}" + (f"/{self._total}" if self._total else "")
            self.print(f"[{time.perf_counter() - self._started:5.0f} s] {done}  {fields}")

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._close()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._close()

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None
