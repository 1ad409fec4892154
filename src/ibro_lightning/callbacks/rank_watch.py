"""Keeps ranks from waiting for one that has failed."""

from __future__ import annotations

import lightning.pytorch as pl

from ibro_lightning.errors import RankError, check_at_least
from ibro_lightning.guards.failure_watch import FailureWatch
from ibro_lightning.guards.interruption import Interrupted
from ibro_lightning.guards.printing import tell


class RankWatch(pl.Callback):
    """Ends all processes of a run with the error of the first one that fails.

    Args:
        grace_s: seconds that a process has to end with its own error once a rank has failed.
        silence_s: seconds without a heartbeat after which a process counts as dead, if nothing else reveals it.
    """

    def __init__(self, grace_s: float = 15.0, silence_s: float = 120.0) -> None:
        check_at_least("grace_s", grace_s, 1)
        check_at_least("silence_s", silence_s, 10)
        self.watch = FailureWatch(grace_s, silence_s)

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if trainer.world_size > 1:
            self.watch.start()

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self.watch.stop()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        # Interrupted: all ranks agreed to stop; keep watching while they write a checkpoint.
        if isinstance(exception, Interrupted) or trainer.world_size == 1:
            return
        self.watch.start()  # in case this happened before setup
        self.watch.report(exception)
        # This rank's error may be a consequence ("connection closed by peer"): name the cause, too.
        if not isinstance(exception, RankError) and (cause := self.watch.failure_of_another()):
            tell(f"error: {cause}")
        self.watch.stop_without_group()
