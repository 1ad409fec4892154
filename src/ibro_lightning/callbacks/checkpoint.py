"""Checkpoints at iteration boundaries: whole or absent, the newest and the best."""

from __future__ import annotations

import math
import os
import shutil
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_only

from ibro_lightning.checkpoints import ABOUT, checkpoint_name, checkpoints_in, iteration_of, why_invalid
from ibro_lightning.errors import ConfigError, check_at_least
from ibro_lightning.guards.disk import PARTIAL, disk_errors
from ibro_lightning.run_folders import run_folder
from ibro_lightning.seeding import run_seed
from ibro_lightning.version import __version__

LAST = "last.ckpt"


class IterationCheckpoint(Checkpoint):
    """Writes ``checkpoints/iteration_000020.ckpt`` every so many iterations, and always when training ends.

    A checkpoint gets its name once it is complete and on the disk; only then older ones are removed. ``last.ckpt`` is a
    link to the newest, for people; ``--ckpt_path last`` looks for itself.

    Args:
        every_n_iterations: how often; 0 means only when training ends.
        keep_last: the newest so many stay; null keeps all.
        best: a metric, such as ``val/starts/avg@4`` or ``rollout/reward``; the checkpoints with its best values stay,
            too. A new best value of an evaluation is a reason to write one; other metrics are compared when one is due.
        mode: are high or low values of ``best`` good?
        keep_best: how many of the best stay.
    """

    def __init__(
        self,
        every_n_iterations: int = 20,
        keep_last: int | None = 2,
        best: str | None = None,
        mode: Literal["max", "min"] = "max",
        keep_best: int = 1,
    ) -> None:
        check_at_least("checkpoint.every_n_iterations", every_n_iterations, 0)
        check_at_least("checkpoint.keep_best", keep_best, 1)
        if keep_last is not None:
            check_at_least("checkpoint.keep_last", keep_last, 1, ", or null to keep all")
        if mode not in ("max", "min"):
            raise ConfigError("checkpoint.mode", mode, "write max or min")
        self.every_n_iterations, self.keep_last = every_n_iterations, keep_last
        self.best, self.mode, self.keep_best = best, mode, keep_best
        self.values: dict[int, float] = {}
        """What ``best`` was at the iterations of the best checkpoints."""
        self._folder = Path()
        self._saved: int | None = None
        self._evaluated: int | None = None

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best, "mode": self.mode, "values": dict(self.values)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if (state_dict["best"], state_dict["mode"]) == (self.best, self.mode):
            self.values = dict(state_dict["values"])

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage == TrainerFn.FITTING:
            self._folder = run_folder(trainer) / "checkpoints"  # a broadcast: all ranks ask
            self._saved = self._evaluated = None

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not trainer.is_last_batch and self._is_due(_iteration(trainer)):
            self._save(trainer)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking:
            self._evaluated = _iteration(trainer)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """After the evaluation of this epoch, so that resuming from here does not repeat it."""
        iteration, limit = _iteration(trainer), trainer.max_epochs
        ends = limit is not None and limit >= 0 and trainer.current_epoch + 1 >= limit
        if ends or self._is_due(iteration) or trainer.strategy.broadcast(self._is_new_best(trainer)):
            self._save(trainer)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """If training ends for another reason than ``max_epochs``."""
        self.save_now(trainer)

    @rank_zero_only
    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """A run that was killed right after it wrote its last checkpoint goes on with nothing left to train."""
        path = self._folder / checkpoint_name(_iteration(trainer))
        if self._saved is None and path.exists():
            self._keep(path)

    def save_now(self, trainer: pl.Trainer) -> None:
        """Write one for the iteration that is done, unless it is there already. All ranks must call this."""
        if self._saved != _iteration(trainer):
            self._save(trainer)

    def _is_due(self, iteration: int) -> bool:
        return bool(self.every_n_iterations) and iteration % self.every_n_iterations == 0

    # What is in it, beside what Lightning puts there.

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        iteration = _iteration(trainer)
        checkpoint[ABOUT] = {
            "version": __version__,
            "algorithm": type(pl_module).__name__,
            "iteration": iteration,
            "evaluated": self._evaluated == iteration,
            "seed": run_seed(),
            "world_size": trainer.world_size,
            "events": _event_files(trainer),
        }

    # Writing, and what stays.

    def _save(self, trainer: pl.Trainer) -> None:
        iteration = _iteration(trainer)
        path = self._folder / checkpoint_name(iteration)
        partial = path.with_name(path.name + PARTIAL)
        # A folder cannot be replaced in one step, so a whole one stays: it was written before this iteration's
        # evaluation, and a run that goes on from it repeats that.
        if (value := self._value(trainer)) is not None:
            self.values[iteration] = value
            self.values = dict(self._ranked()[: self.keep_best])
        if trainer.strategy.broadcast(path.is_dir() and why_invalid(path) is None):
            self._saved = iteration
            return
        with disk_errors(path):
            try:
                _remove(partial)
                trainer.save_checkpoint(partial, weights_only=False)  # optimizers, too
                self._finish(partial, path)
            except BaseException:
                _remove(partial)
                raise
        trainer.strategy.barrier("checkpoint")
        self._saved = iteration

    @rank_zero_only
    def _finish(self, partial: Path, path: Path) -> None:
        """Give it its name; from here on it is the newest."""
        if partial.is_file():
            _to_disk(partial)
        if path.is_dir():  # a damaged one; os.replace takes the place of files only
            _remove(path)
        os.replace(partial, path)
        self._keep(path)

    def _keep(self, path: Path) -> None:
        """Link to the newest, and remove those that need not stay."""
        link = path.with_name(LAST + PARTIAL)
        link.unlink(missing_ok=True)
        link.symlink_to(path.name)
        os.replace(link, path.with_name(LAST))
        _to_disk(path.parent)
        stays = set(self.values)
        for number, old in enumerate(checkpoints_in(path.parent)):
            if self.keep_last is not None and number >= self.keep_last and iteration_of(old) not in stays:
                _remove_atomically(old)

    def _value(self, trainer: pl.Trainer) -> float | None:
        """The metric now; None if there is none, or only one of an earlier iteration."""
        if self.best is None or (self.best.startswith("val/") and self._evaluated != _iteration(trainer)):
            return None
        known = trainer.callback_metrics
        if self.best not in known:
            some = ", ".join(sorted(known)[:8])
            raise ConfigError("checkpoint.best", self.best, f"there is no such metric: write one of {some}, …, or null")
        value = float(known[self.best])
        return value if math.isfinite(value) else None

    def _is_new_best(self, trainer: pl.Trainer) -> bool:
        value = self._value(trainer)
        if value is None or self.best is None or not self.best.startswith("val/"):
            return False
        return len(self.values) < self.keep_best or any(
            self._key(value) > self._key(old) for old in self.values.values()
        )

    def _ranked(self) -> list[tuple[int, float]]:
        """The best first; of equal ones the earlier."""
        return sorted(self.values.items(), key=lambda item: (-self._key(item[1]), item[0]))

    def _key(self, value: float) -> float:
        return value if self.mode == "max" else -value


def _iteration(trainer: pl.Trainer) -> int:
    return trainer.fit_loop.epoch_loop.total_batch_idx + 1


def _event_files(trainer: pl.Trainer) -> dict[str, int]:
    """TensorBoard's files with their sizes in bytes, once all is in them: where the curves end at this moment."""
    sizes: dict[str, int] = {}
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger) and trainer.is_global_zero:
            logger.experiment.flush()
            sizes |= {path.name: path.stat().st_size for path in Path(logger.log_dir).glob("events.out.tfevents.*")}
    return sizes


@rank_zero_only
def _remove(path: Path) -> None:
    """A checkpoint that nobody would take for a whole one."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _remove_atomically(path: Path) -> None:
    if path.is_dir():
        aside = path.with_name(f"{path.name}.old{PARTIAL}")
        path.rename(aside)
        path = aside
    _remove(path)


def _to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
