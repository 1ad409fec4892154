"""A Trainer's run folder, for rollouts, evaluations, checkpoints, model and summary. It is ``default_root_dir``,
whatever the loggers, which choose where they keep their own files.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TypeVar

import lightning.pytorch as pl
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only

from ibro_lightning.errors import ConfigError
from ibro_lightning.guards.disk import free_name
from ibro_lightning.runs import run_files
from ibro_lightning.runs.claims import claim, survey
from ibro_lightning.runs.marks import read_mark
from ibro_lightning.runs.moving import holds_training, move, moving_alone, recognize, recover, recover_alone

T = TypeVar("T")
PARTS = tuple(part for part in run_files.PARTS["fit"] if part != "config.yaml")
"""The parts that training writes, except its settings."""


def run_folder(trainer: pl.Trainer) -> Path:
    """The Trainer's ``default_root_dir``, on any rank."""
    # trainer.log_dir would be the first logger's folder.
    return Path(trainer.default_root_dir)


def callbacks_of(trainer: pl.Trainer, kind: type[T]) -> list[T]:
    """The Trainer's callbacks of this class."""
    return [callback for callback in trainer.callbacks if isinstance(callback, kind)]  # type: ignore[attr-defined]


def is_fast_dev_run(trainer: pl.Trainer) -> bool:
    """Whether this is a ``fast_dev_run``, which must leave no trace."""
    return bool(trainer.fast_dev_run)  # type: ignore[attr-defined]


def refuse_loggers(trainer: pl.Trainer) -> None:
    """Raise :class:`ConfigError` if a logger keeps its files in one of the run's own folders, whose files are replaced,
    removed or moved without regard to it."""
    root = run_folder(trainer).resolve()
    for logger in trainer.loggers:
        place = logger.save_dir
        if isinstance(logger, CSVLogger | TensorBoardLogger):
            # Reading log_dir would fix the version, which a resumed run has yet to choose.
            version = logger._version if isinstance(logger._version, str) else ""
            place = str(Path(logger.root_dir, version))
        if not isinstance(place, str | Path) or not place or "://" in str(place):
            continue
        inside = Path(place).resolve()
        if part := next((part for part in PARTS if inside.is_relative_to(root / part)), None):
            remedy = f"its curves would be in {place}, and the run keeps {part} there: write another name or save_dir"
            raise ConfigError("trainer.logger", type(logger).__name__, remedy)


def evaluation_counts(trainer: pl.Trainer) -> bool:
    """Whether the current evaluation is recorded. Lightning's sanity check counts as the evaluation before training
    only if it is complete (``num_sanity_val_steps=-1``, or small sets) and the run is not resumed."""
    if not trainer.sanity_checking:
        return True
    is_new = trainer.fit_loop.epoch_loop.total_batch_idx < 0
    return is_new and trainer.num_sanity_val_batches == trainer.num_val_batches


def evaluation_name(trainer: pl.Trainer) -> str:
    """The current evaluation's name: ``iteration_000020`` in training, otherwise the command."""
    if trainer.testing:
        return "test"
    iteration = 0 if trainer.sanity_checking else trainer.fit_loop.epoch_loop.total_batch_idx + 1
    return f"iteration_{iteration:06d}" if iteration or trainer.sanity_checking else "validate"


@rank_zero_only
def enter(trainer: pl.Trainer, command: str) -> None:
    """Undo the unfinished move of a process that died, and claim what the command writes (for ``fit``,
    :func:`.make_room` and :func:`.reopen` do that). Call it before a command reads its run's folder."""
    if is_fast_dev_run(trainer):
        return
    if command == "fit":
        recover(run_folder(trainer))
    else:
        recover_alone(run_folder(trainer), command)
        claim(run_folder(trainer), run_files.PARTS[command])


def claim_for(trainer: pl.Trainer, *parts: str) -> None:
    """Claim names in the Trainer's run folder; call it on all ranks in the ``setup`` of what writes them."""
    if is_fast_dev_run(trainer):
        return
    folder, files = run_folder(trainer), list[str]()
    if trainer.state.fn == TrainerFn.FITTING and trainer.is_global_zero:
        if trainer.ckpt_path:
            recognize(folder, Path(trainer.ckpt_path))
        files = _curve_files(trainer, folder)
    claim(folder, parts, files=files, writes=trainer.is_global_zero)


def _curve_files(trainer: pl.Trainer, folder: Path) -> list[str]:
    """Files that loggers will write in the run's folder, except TensorBoard's, whose names identify their process."""
    mark = read_mark(folder)
    recorded = mark.files if mark is not None else frozenset[str]()
    found = []
    for logger in trainer.loggers:
        names = ("hparams.yaml", "metrics.csv") if isinstance(logger, CSVLogger) else ("hparams.yaml",)
        if isinstance(logger, CSVLogger | TensorBoardLogger):
            paths = [Path(logger.log_dir).resolve() / name for name in names]
            inside = [path for path in paths if path.is_relative_to(folder.resolve()) and not path.exists()]
            found += [path.relative_to(folder.resolve()).as_posix() for path in inside]
    return [name for name in found if name not in recorded]


@rank_zero_only
def refuse_curves(loggers: Iterable[Logger]) -> None:
    """Raise :class:`ConfigError` if a new run's CSV logger would, when it opens, remove the curves of another run."""
    for logger in loggers:
        if not isinstance(logger, CSVLogger) or not isinstance(logger._version, str | int):
            continue
        if (path := Path(logger.log_dir, "metrics.csv")).exists():
            remedy = f"{path} holds the curves of another run: move it, or write another version, or null"
            raise ConfigError("trainer.logger.version", logger._version, remedy)


@rank_zero_only
def clear_way(trainer: pl.Trainer) -> None:
    """Move an earlier run's files to ``earlier.1`` within the folder, for a run from Python, whose loggers have opened
    their files too early for :func:`.make_room`. Call it before the first evaluation."""
    folder = run_folder(trainer)
    if trainer.fit_loop.epoch_loop.total_batch_idx >= 0 or is_fast_dev_run(trainer):
        return
    recover(folder)
    own = [path for path in survey(folder).own if path.split("/")[0] in PARTS] if holds_training(folder) else []
    if own:
        with moving_alone(folder):
            aside = move(folder, free_name(folder / "earlier"), own)
        rank_zero_info(f"an earlier run was in {folder}: moved to {aside}")
