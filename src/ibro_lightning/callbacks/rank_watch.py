"""No rank waits for one that has failed."""

from __future__ import annotations

import sys

import lightning.pytorch as pl

from ibro_lightning.errors import RankError, check_at_least
from ibro_lightning.guards.failure_watch import FailureWatch
from ibro_lightning.guards.interruption import Interrupted


class RankWatch(pl.Callback):
    """Ends all processes of a run when one of them fails, with that one's error.

    Args:
        grace_s: seconds for a process to leave by itself, once some rank has failed.
        silence_s: seconds without a sign of life after which a process counts as dead, where nothing else tells.
    """

    def __init__(self, grace_s: float = 15.0, silence_s: float = 120.0) -> None:
        check_at_least("rank_watch.grace_s", grace_s, 1)
        check_at_least("rank_watch.silence_s", silence_s, 10)
        self.watch = FailureWatch(grace_s, silence_s)

    def start(self) -> None:
        """Watch before the Trainer's first hook: data may be missing on one machine alone."""
        self.watch.start()

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if trainer.world_size > 1:
            self.watch.start()

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self.watch.stop()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        if isinstance(exception, Interrupted):  # all ranks agreed to stop; a checkpoint comes first, so watch on
            return
        if trainer.world_size == 1:
            return
        self.watch.start()  # in case this happened before setup
        self.watch.report(exception)
        # What this rank says may be a consequence ("connection closed by peer"): name the cause, too.
        if not isinstance(exception, RankError) and (known := self.watch.failure_of_another()):
            sys.stderr.write(f"error: {known}\n")
