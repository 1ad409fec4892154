"""Checkpoints at iteration boundaries, written atomically: the newest and the best are kept."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_only

from ibro_lightning import __version__
from ibro_lightning.errors import ConfigError, check_count
from ibro_lightning.guards.disk import PARTIAL, disk_errors
from ibro_lightning.runs.checkpoints.catalog import checkpoint_name, iteration_of, newer_valid
from ibro_lightning.runs.checkpoints.index import ABOUT
from ibro_lightning.runs.checkpoints.keeping import Keeper, remove_checkpoint
from ibro_lightning.runs.folder import claim_for, clear_way, is_fast_dev_run, run_folder
from ibro_lightning.runs.holding import RunLock
from ibro_lightning.runs.loggers import logger_states
from ibro_lightning.seeding import run_seed


class IterationCheckpoint(Checkpoint):
    """Writes ``checkpoints/iteration_000020.ckpt`` every ``every_n_iterations``, and always when training ends.

    A checkpoint gets its name once it is complete and synced to disk; only then are older ones removed, and only those
    that this run wrote. ``last.ckpt`` is a link to the newest, for convenience; ``--ckpt_path last`` does not use it.

    Args:
        every_n_iterations: how often; 0 means only when training ends.
        keep_last: how many of the newest valid checkpoints to keep; null keeps all.
        best: a metric, such as ``val/starts/avg@4`` or ``rollout/reward``; the checkpoints with its best values are
            kept, too. A new best value of an evaluation triggers a checkpoint; other metrics are compared when one is
            due.
        mode: whether high (max) or low (min) values of ``best`` are good.
        keep_best: how many of the best to keep.
    """

    def __init__(
        self,
        every_n_iterations: int = 20,
        keep_last: int | None = 2,
        best: str | None = None,
        mode: Literal["max", "min"] = "max",
        keep_best: int = 1,
    ) -> None:
        check_count("every_n_iterations", every_n_iterations, 0)
        check_count("keep_best", keep_best, 1)
        if keep_last is not None:
            check_count("keep_last", keep_last, 1, ", or null to keep all")
        if mode not in ("max", "min"):
            raise ConfigError("mode", mode, "write max or min")
        self.every_n_iterations, self.keep_last = every_n_iterations, keep_last
        self.best, self.mode, self.keep_best = best, mode, keep_best
        self.values: dict[int, float] = {}
        """The value of ``best`` by iteration, for the best checkpoints."""
        self._folder = Path()
        self._saved: int | None = None
        self._evaluated: int | None = None
        self._from = 0

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best, "mode": self.mode, "values": dict(self.values)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if (state_dict["best"], state_dict["mode"]) == (self.best, self.mode):
            self.values = dict(state_dict["values"])

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage == TrainerFn.FITTING:
            RunLock.of(trainer).take(trainer)
            self._folder = run_folder(trainer) / "checkpoints"
            claim_for(trainer, "checkpoints")
            self._saved = self._evaluated = None

    def on_sanity_check_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.on_train_start(trainer, pl_module)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Make way for this run, and refuse newer checkpoints of another history in its folder."""
        clear_way(trainer)
        self._from = _iteration(trainer)
        if self._from == 0 or is_fast_dev_run(trainer):
            return
        newer = newer_valid(self._folder / checkpoint_name(self._from)) if trainer.is_global_zero else None
        if (newer := trainer.strategy.broadcast(newer)) is not None:
            remedy = f"{newer} is newer: resume from that, or remove the newer ones"
            raise ConfigError("ckpt_path", trainer.ckpt_path, remedy)
        if trainer.is_global_zero and trainer.ckpt_path:  # by now all ranks have read their checkpoints
            path = Path(trainer.ckpt_path).resolve()
            if path.parent == self._folder.resolve() and iteration_of(path) == self._from:
                self._keeper.resume_from(self._folder / path.name)

    @property
    def _keeper(self) -> Keeper:
        return Keeper(self._folder, self.keep_last)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not trainer.is_last_batch and self._is_due(_iteration(trainer)) and not _evaluation_follows(trainer):
            self._save(trainer)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.state.fn != TrainerFn.FITTING or trainer.sanity_checking:
            return
        self._evaluated = iteration = _iteration(trainer)
        if not trainer.is_last_batch and (
            self._is_due(iteration) or trainer.strategy.broadcast(self._is_new_best(trainer))
        ):  # within an epoch; at its end on_train_epoch_end follows
            self._save(trainer)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Save after the epoch's evaluation, so that a resumed run does not repeat it."""
        iteration, limit = _iteration(trainer), trainer.max_epochs
        ends = limit is not None and limit >= 0 and trainer.current_epoch + 1 >= limit
        if iteration == self._from and self._evaluated != iteration:
            return  # with max_steps, a resumed Lightning ends the checkpoint's epoch once more
        if ends or self._is_due(iteration) or trainer.strategy.broadcast(self._is_new_best(trainer)):
            self._save(trainer)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Save if training ends for another reason than ``max_epochs``."""
        self.save_now(trainer)

    @rank_zero_only
    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Remove superseded checkpoints after a resume with nothing left to train: the run may have been killed right
        after its last checkpoint."""
        path = self._folder / checkpoint_name(_iteration(trainer))
        if self._saved is None and not is_fast_dev_run(trainer) and self._keeper.has(path):
            self._keeper.keep(path, self.values)

    def save_now(self, trainer: pl.Trainer) -> None:
        """Write a checkpoint of the last finished iteration, unless it exists. All ranks must call this."""
        if self._saved != _iteration(trainer):
            self._save(trainer)

    def _is_due(self, iteration: int) -> bool:
        return bool(self.every_n_iterations) and iteration % self.every_n_iterations == 0

    # Contents beyond Lightning's.

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
            "run_id": self._keeper.run_id if trainer.is_global_zero and not is_fast_dev_run(trainer) else None,
            "loggers": logger_states(trainer.loggers, run_folder(trainer)) if trainer.is_global_zero else [],
        }

    # Writing and removing.

    def _save(self, trainer: pl.Trainer) -> None:
        iteration = _iteration(trainer)
        if is_fast_dev_run(trainer):
            self._saved = iteration
            return
        path = self._folder / checkpoint_name(iteration)
        partial = path.with_name(path.name + PARTIAL)
        if (value := self._value(trainer)) is not None:
            self.values[iteration] = value
            # The best first; of equal ones the earlier first.
            ranked = sorted(self.values.items(), key=lambda item: (-self._key(item[1]), item[0]))
            self.values = dict(ranked[: self.keep_best])
        # A folder cannot be replaced in one step, so the shards of a valid one stay, which are of this iteration. If it
        # was written before the iteration's evaluation, everything but the tensors is updated.
        stays = trainer.strategy.broadcast(trainer.is_global_zero and path.is_dir() and self._keeper.has(path))
        keeper = self._keeper if trainer.is_global_zero else None
        with disk_errors(path):
            try:
                if keeper:
                    keeper.make_way(partial)
                if not stays:
                    trainer.save_checkpoint(partial, weights_only=False)  # optimizers, too
                    if keeper:
                        keeper.give_name(partial, path)
                elif self._evaluated == iteration:
                    checkpoint = trainer._checkpoint_connector.dump_checkpoint(weights_only=False)
                    if keeper:
                        keeper.update(path, checkpoint)
            except BaseException:
                if keeper:
                    remove_checkpoint(partial)
                raise
            if keeper:
                keeper.keep(path, self.values)
        trainer.strategy.barrier("checkpoint")
        self._saved = iteration

    def _value(self, trainer: pl.Trainer) -> float | None:
        """The current value of ``best``; None if there is none, or only that of an earlier iteration."""
        if self.best is None:
            return None
        iteration = _iteration(trainer)
        if self._evaluated != iteration if self.best.startswith("val/") else iteration == self._from:
            return None  # a run that has just resumed has not measured anything yet
        metrics = trainer.callback_metrics
        if self.best not in metrics:
            names = ", ".join(sorted(metrics)[:8])
            raise ConfigError("best", self.best, f"there is no such metric: write one of {names}, …, or null")
        value = float(metrics[self.best])
        return value if math.isfinite(value) else None

    def _is_new_best(self, trainer: pl.Trainer) -> bool:
        value = self._value(trainer)
        if value is None or self.best is None or not self.best.startswith("val/"):
            return False
        return len(self.values) < self.keep_best or any(
            self._key(value) > self._key(old) for old in self.values.values()
        )

    def _key(self, value: float) -> float:
        return value if self.mode == "max" else -value


def _iteration(trainer: pl.Trainer) -> int:
    return trainer.fit_loop.epoch_loop.total_batch_idx + 1


def _evaluation_follows(trainer: pl.Trainer) -> bool:
    """Whether Lightning will evaluate after this batch. The checkpoint then has to wait: a run resumed from an earlier
    one would skip the evaluation."""
    loop = trainer.fit_loop
    follows = loop.epoch_loop._should_check_val_fx(loop._data_fetcher)  # type: ignore[arg-type]
    return trainer.strategy.broadcast(follows)  # ranks' clocks differ, if the interval is a time
