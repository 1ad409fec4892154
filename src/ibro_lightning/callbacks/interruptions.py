"""Stops a run on request (Ctrl-C, ``kill``, a scheduler that reclaims its nodes) without losing work.

The effect of a signal depends on the phase:

- generating or judging: the iteration is abandoned at once; the resumed run repeats it with the same prompts;
- preparing or updating: the iteration is finished first;
- evaluating: the evaluation is abandoned at once; the resumed run repeats it from the beginning;
- saving or exporting: that is finished first;
- setting up, or evaluating before training: nothing is saved.

Then a checkpoint is written, and the process ends with exit code 128 + the signal's number: 143 for SIGTERM, 130 for
Ctrl-C, 129 for SIGHUP (a lost terminal; not handled where it is ignored, as under ``nohup``). A second Ctrl-C ends the
run at once, without a new checkpoint.

A run whose folder is moved or removed stops in the same way, with exit code 2. As only its state in memory may be left,
it writes a checkpoint to a new folder.
"""

from __future__ import annotations

import os
import signal
import subprocess
import threading
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_only, rank_zero_warn

from ibro_lightning.batches import Rollout
from ibro_lightning.callbacks.rank_watch import RankWatch
from ibro_lightning.guards import interruption, signals
from ibro_lightning.guards.interruption import Interrupted
from ibro_lightning.guards.printing import tell, tell_now
from ibro_lightning.ranks import Ranks
from ibro_lightning.runs.folder import callbacks_of, is_fast_dev_run, run_folder
from ibro_lightning.runs.run_files import MARK

GONE = 2
"""Exit code of a run whose folder is gone, which the user has to fix."""


class Interruptions(pl.Callback):
    """Handles SIGINT, SIGTERM, SIGHUP and SLURM's requeue signal in place of Lightning, whose SIGTERM handler runs a
    collective whenever the signal arrives: with several ranks it never returns.

    Ranks agree to stop when they agree on an iteration's responses (:meth:`.Ranks.all_or_none`), so it is enough that
    the signal reaches one of them. Callbacks with a method ``save_now(trainer)`` write the checkpoint.
    """

    def __init__(self) -> None:
        self._before: dict[int, Any] = {}
        self._boundary: dict[str, Any] | None = None
        self._requeue_signal: int | None = None
        self._requeue = False
        self._trainer: pl.Trainer | None = None
        self._folder_id: tuple[int, int] | None = None

    # The handlers, from setup to teardown.

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage == TrainerFn.FITTING:
            interruption.clear()
            self._boundary, self._requeue = None, False
            if not _writers(trainer) and trainer.checkpoint_callbacks and not is_fast_dev_run(trainer):
                rank_zero_warn("Interruptions saves nothing when it ends a run: add an IterationCheckpoint")
        self._trainer = trainer
        # In place of Lightning's own handlers.
        trainer._signal_connector.register_signal_handlers = lambda: None  # type: ignore[method-assign]
        if self._before or threading.current_thread() is not threading.main_thread():
            return
        numbers = signals.stop_signals()
        environment = trainer._accelerator_connector.cluster_environment
        if isinstance(environment, SLURMEnvironment) and environment.auto_requeue:
            self._requeue_signal = environment.requeue_signal or signal.SIGUSR1
            numbers.append(signal.Signals(self._requeue_signal))
        self._before = {number: signal.signal(number, self._handle) for number in numbers}

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before, self._trainer = {}, None

    def _handle(self, number: int, frame: object) -> None:
        signals.record_handled()
        again = interruption.requested() is not None
        if again and number == signal.SIGINT:
            signals.at_once(lambda: self._pass_on(signal.SIGKILL))
        name = signal.Signals(number).name
        if not again:
            self._requeue = number == self._requeue_signal
            tell_now(f"\n{name}: the run will stop as soon as it can without losing work; Ctrl-C stops it at once")
            self._pass_on(signal.SIGTERM)
        interruption.request(name, 128 + number)

    def _pass_on(self, number: signal.Signals) -> None:
        """Send a signal to the processes that Lightning launched."""
        launcher = None if self._trainer is None else self._trainer.strategy.launcher
        if isinstance(launcher, _SubprocessScriptLauncher):
            launcher.kill(number)

    # The state from which a checkpoint would resume, recorded at every boundary.

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
        self._stop_if_moved(trainer)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if not isinstance(batch, Rollout):  # for rollouts, the datamodule has done this
            with Ranks.of(trainer.strategy).all_or_none():
                pass
        self._boundary = None

    # The run's folder.

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.is_global_zero and not is_fast_dev_run(trainer):
            self._folder_id = _folder_id(run_folder(trainer))

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._stop_if_moved(trainer)

    def _stop_if_moved(self, trainer: pl.Trainer) -> None:
        """Stop the run if its folder was moved or removed: the next write would recreate it without its settings."""
        folder = run_folder(trainer)
        if self._folder_id is not None and _folder_id(folder) != self._folder_id:
            self._folder_id = None
            log_dirs = [Path(logger.log_dir).absolute() for logger in trainer.loggers if logger.log_dir]
            inside = [log_dir for log_dir in log_dirs if folder.absolute() in log_dir.parents]
            for path in (folder, *inside):  # loggers may still have something to write
                path.mkdir(parents=True, exist_ok=True)
            interruption.request(f"the loss of its folder {folder}, which was moved or removed", GONE)

    # The end.

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        if isinstance(exception, Interrupted):
            # Before setup and after teardown there is nothing to save.
            training = trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking and self._trainer
            try:
                saved = bool(training) and self._save(trainer)
            except Exception as error:  # the other ranks would wait for this one's part
                for rank_watch in callbacks_of(trainer, RankWatch):
                    rank_watch.watch.report(error)
                raise
            exception.is_reported = True
            self._report_end(trainer, exception, saved)
            for rank_watch in callbacks_of(trainer, RankWatch):
                rank_watch.watch.stop()
            interruption.clear()
        self.teardown(trainer, pl_module, "")

    def _save(self, trainer: pl.Trainer) -> bool:
        """Write the checkpoint if there is anything to resume from, and return whether it was written. Collective: all
        ranks must call it."""
        progress: Any = trainer.fit_loop.epoch_loop.batch_progress
        if progress.total.completed == 0 or is_fast_dev_run(trainer):
            return False
        if self._boundary is not None:
            trainer.fit_loop.load_state_dict(self._boundary)
        else:  # in the middle of an epoch; a batch that was fetched but not started does not count
            for counter in (progress.total, progress.current):
                counter.ready = counter.completed
            if progress.current.started != progress.current.completed:
                return False
        trainer.training = True
        for writer in _writers(trainer):
            writer.save_now(trainer)
        return bool(_writers(trainer))

    @rank_zero_only
    def _report_end(self, trainer: pl.Trainer, exception: Interrupted, saved: bool) -> None:
        done = trainer.fit_loop.epoch_loop.total_batch_idx + 1
        nothing = "nothing is saved" if done and not _writers(trainer) else "nothing had to be saved"
        after = f"after {done} iteration{'s' * (done > 1)}: resume with --ckpt_path last" if saved else nothing
        tell(f"stopped by {exception}, {after}")
        if self._requeue:
            requeue()


def _writers(trainer: pl.Trainer) -> list[Any]:
    """The callbacks that write the checkpoint of a stopped run."""
    return [callback for callback in callbacks_of(trainer, object) if hasattr(callback, "save_now")]


def _state_before_validation(trainer: pl.Trainer) -> dict[str, Any]:
    """The loops' state from which a run resumes at the start of the validation. Lightning detects that by a batch of it
    that was started but not finished."""
    total: Any = trainer.fit_loop.epoch_loop.val_loop.batch_progress.total
    total.ready = total.started = total.completed = total.processed
    state = trainer.fit_loop.state_dict()
    started = state["epoch_loop.val_loop.batch_progress"]["total"]
    started["ready"] = started["started"] = started["processed"] + 1
    return state


def requeue() -> None:
    """Ask SLURM to start this job again as soon as it has nodes for it."""
    array = os.environ.get("SLURM_ARRAY_JOB_ID")
    job = f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}" if array else os.environ.get("SLURM_JOB_ID", "")
    try:
        code = subprocess.run(["scontrol", "requeue", job], check=False).returncode
    except OSError as error:
        tell(f"the job is not requeued: {error}")
        return
    tell(f"job {job} is requeued" if code == 0 else f"scontrol requeue {job} failed with code {code}")


def _folder_id(folder: Path) -> tuple[int, int] | None:
    """Device and inode, which tell a run's folder from another of that name; None if it or its mark is missing."""
    try:
        (folder / MARK).stat()
        found = folder.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino
