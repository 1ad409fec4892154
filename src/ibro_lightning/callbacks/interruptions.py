"""Asked to stop (Ctrl-C, ``kill``, a scheduler that wants its nodes back), a run loses nothing.

What a signal does depends on what the run is doing:

- generating or judging: the iteration is given up at once; when the run goes on, it begins anew with the same prompts;
- preparing or updating: the iteration is finished first;
- evaluating: the evaluation is given up at once, and repeated from its beginning when the run goes on;
- saving or exporting: that is finished first;
- setting up, or evaluating before training: nothing is saved.

A checkpoint of that moment follows, and the process ends with exit code 128 + the signal's number: 143 for SIGTERM, 130
for Ctrl-C. A second Ctrl-C ends it at once, and the newest checkpoint is the one before.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from typing import Any

import lightning.pytorch as pl
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_only

from ibro_lightning.callbacks.rank_watch import RankWatch
from ibro_lightning.guards import interruption
from ibro_lightning.guards.failure_watch import FailureWatch
from ibro_lightning.guards.interruption import Interrupted
from ibro_lightning.ranks import Ranks
from ibro_lightning.types import Rollout


class Interruptions(pl.Callback):
    """Handles SIGINT, SIGTERM and SLURM's requeue signal in place of Lightning, whose SIGTERM handler runs a collective
    in whatever moment the signal comes: with several ranks it never returns.

    Ranks agree to stop when they agree on the responses of an iteration (:meth:`.Ranks.together`), so it is enough if
    the signal reaches one of them. Checkpoints are written by the callback that has a method ``save_now(trainer)``.
    """

    def __init__(self) -> None:
        self._before: dict[int, Any] = {}
        self._boundary: dict[str, Any] | None = None
        self._requeue_signal: int | None = None
        self._requeue = False
        self._trainer: pl.Trainer | None = None

    # The handlers, from setup to teardown.

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage == TrainerFn.FITTING:
            interruption.clear()
            self._boundary, self._requeue = None, False
        self._trainer = trainer
        trainer._signal_connector.register_signal_handlers = _nothing  # type: ignore[method-assign]
        if self._before or threading.current_thread() is not threading.main_thread():
            return
        signals = [signal.SIGINT, signal.SIGTERM]
        environment = trainer._accelerator_connector.cluster_environment
        if isinstance(environment, SLURMEnvironment) and environment.auto_requeue:
            self._requeue_signal = environment.requeue_signal or signal.SIGUSR1
            signals.append(signal.Signals(self._requeue_signal))
        self._before = {number: signal.signal(number, self._handle) for number in signals}

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before, self._trainer = {}, None

    def _handle(self, number: int, frame: object) -> None:
        again = interruption.requested() is not None
        if again and number == signal.SIGINT:
            raise KeyboardInterrupt
        name = signal.Signals(number).name
        if not again:
            self._requeue = number == self._requeue_signal
            # Not print: the signal may have come in the middle of one.
            os.write(2, f"\n{name}: the run will stop at its next safe moment; Ctrl-C stops it at once\n".encode())
            launcher = None if self._trainer is None else self._trainer.strategy.launcher
            if isinstance(launcher, _SubprocessScriptLauncher):
                launcher.kill(signal.SIGTERM)
        interruption.request(name, 128 + number)

    # Where a checkpoint would go on: noted whenever nothing is half done.

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        if trainer.state.fn == TrainerFn.FITTING:
            self._boundary = checkpoint.get("loops", {}).get("fit_loop")

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._boundary = trainer.fit_loop.state_dict()

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking:
            self._boundary = _state_before_validation(trainer)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._boundary = None

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if not isinstance(batch, Rollout):  # of rollouts, the datamodule has asked
            with Ranks.of(trainer.strategy).together():
                pass
        self._boundary = None

    # The end.

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        if isinstance(exception, Interrupted):
            training = trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking
            self._farewell(trainer, exception, training and self._save_or_tell(trainer))
            for watch in _watches(trainer):
                watch.stop()
            interruption.clear()
        self.teardown(trainer, pl_module, "")

    def _save_or_tell(self, trainer: pl.Trainer) -> bool:
        """A rank that cannot write its part must not leave the others waiting."""
        try:
            return self._save(trainer)
        except Exception as error:
            for watch in _watches(trainer):
                watch.report(error)
            raise

    def _save(self, trainer: pl.Trainer) -> bool:
        """Have the checkpoint written, if there is anything to go on with; all ranks take part."""
        progress: Any = trainer.fit_loop.epoch_loop.batch_progress
        if progress.total.completed == 0:
            return False
        if self._boundary is not None:
            trainer.fit_loop.load_state_dict(self._boundary)
        else:  # in the middle of an epoch; a batch that is there, but not begun, does not count
            for counter in (progress.total, progress.current):
                counter.ready = counter.completed
            if progress.current.started != progress.current.completed:
                return False
        trainer.training = True
        writers = [callback for callback in trainer.callbacks if hasattr(callback, "save_now")]  # type: ignore[attr-defined]
        for writer in writers:
            writer.save_now(trainer)
        return bool(writers)

    @rank_zero_only
    def _farewell(self, trainer: pl.Trainer, exception: Interrupted, saved: bool) -> None:
        done = trainer.fit_loop.epoch_loop.total_batch_idx + 1
        after = f"after {done} iterations: go on with --ckpt_path last" if saved else "nothing had to be saved"
        sys.stderr.write(f"stopped by {exception}, {after}\n")
        if self._requeue:
            requeue()


def _watches(trainer: pl.Trainer) -> list[FailureWatch]:
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    return [callback.watch for callback in callbacks if isinstance(callback, RankWatch)]


def _nothing() -> None:
    """In place of Lightning's handlers."""


def _state_before_validation(trainer: pl.Trainer) -> dict[str, Any]:
    """The loops' state, from which a run goes on with the validation from its beginning. Lightning asks whether a batch
    of it was begun and not finished."""
    total: Any = trainer.fit_loop.epoch_loop.val_loop.batch_progress.total
    total.ready = total.started = total.completed = total.processed
    state = trainer.fit_loop.state_dict()
    begun = state["epoch_loop.val_loop.batch_progress"]["total"]
    begun["ready"] = begun["started"] = begun["processed"] + 1
    return state


def requeue() -> None:
    """Ask SLURM to start this job again, when it has nodes for it."""
    array = os.environ.get("SLURM_ARRAY_JOB_ID")
    job = f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}" if array else os.environ.get("SLURM_JOB_ID", "")
    try:
        code = subprocess.run(["scontrol", "requeue", job], check=False).returncode
    except OSError as error:
        sys.stderr.write(f"the job is not requeued: {error}\n")
        return
    sys.stderr.write(f"job {job} is requeued\n" if code == 0 else f"scontrol requeue {job} failed with code {code}\n")
