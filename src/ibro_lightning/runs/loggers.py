"""What a run needs of its loggers beyond Lightning's interface: where the curves are, how they resume, text tables.

A logger chooses where it keeps its files, independently of :func:`.run_folder`. Loggers other than Lightning's get
metrics, and tables if they have W&B's ``log_text``.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import CometLogger, CSVLogger, Logger, MLFlowLogger, TensorBoardLogger, WandbLogger
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.utilities import rank_zero_info

from ibro_lightning.runs.curve_files import open_csv, read_rows
from ibro_lightning.runs.run_files import EVENTS, METRICS


@dataclass(frozen=True)
class Table:
    """Rows of text under named columns."""

    columns: list[str]
    rows: list[list[str]]
    markdown: str
    """The same table, for loggers that render Markdown."""


def state_of(logger: Any, run: Path) -> dict[str, Any]:
    """Flush a logger and return what a checkpoint records: where its curves currently end."""
    match logger:
        case TensorBoardLogger():  # event files only grow, so their sizes tell what belongs to a checkpoint
            logger.experiment.flush()
            folder = Path(logger.log_dir)
            sizes = {path.name: path.stat().st_size for path in folder.glob(EVENTS)}
            return {"version": logger.version, "folder": _relative(folder, run), "events": sizes}
        case CSVLogger():  # metrics.csv is rewritten when a new metric appears, but its rows keep their order
            logger.save()
            path = Path(logger.log_dir, METRICS)
            rows = len(read_rows(path)[1]) if path.exists() else 0
            return {"version": logger.version, "folder": _relative(path.parent, run), "rows": rows}
        case MLFlowLogger():
            return {"run": logger.run_id}
        case WandbLogger() | CometLogger():
            return {"run": logger.version}
    return {}


def resume_logger(logger: Any, state: Mapping[str, Any], run: Path) -> None:
    """Continue the curves that ``state`` describes; the logger must not have been opened yet. W&B, MLflow and Comet
    cannot delete the points after the checkpoint."""
    match logger:
        case TensorBoardLogger() | CSVLogger():
            if logger._version is None:  # the settings name none: the logger would take the next free one
                logger._version = state["version"]
            if isinstance(logger, CSVLogger) and Path(logger.log_dir).resolve() == (run / state["folder"]).resolve():
                open_csv(logger)
        case WandbLogger():
            if logger.version is None:  # the user set no id; W&B's "resume" is "allow" by default
                logger._id = logger._wandb_init["id"] = state["run"]
        case MLFlowLogger():
            if logger._run_id is None:
                logger._run_id = state["run"]
        case CometLogger():
            if logger.version != state["run"]:  # the constructor starts an experiment, before the checkpoint is known
                remedy = f"to continue the run's own, write its experiment_key: {state['run']}"
                rank_zero_info(f"CometLogger has started a new experiment; {remedy}")
        case DummyLogger():  # of fast_dev_run
            pass
        case _:
            name = type(logger).__name__
            rank_zero_info(f"{name} resumes by its own settings, and may show iterations after the checkpoint twice")


def place_of(logger: Any) -> str | None:
    """How to view a logger's curves; None if there are none."""
    match logger:
        case TensorBoardLogger():
            return f"tensorboard --logdir {logger.log_dir}"
        case CSVLogger():
            return str(Path(logger.log_dir, METRICS))
        case WandbLogger() if not getattr(logger.experiment, "url", None):
            folder = getattr(logger.experiment, "dir", None)
            return f"wandb sync {Path(folder).parent}" if folder else None
        case WandbLogger() | CometLogger():
            url = getattr(logger.experiment, "url", None)
            return str(url) if url else None
        case MLFlowLogger():
            return f"mlflow ui --backend-store-uri {logger._tracking_uri}  (run {logger.run_id})"
        case DummyLogger():
            return None
    where = getattr(logger, "log_dir", None) or logger.save_dir
    return type(logger).__name__ + (f" in {where}" if where else "")


def _log_table(logger: Any, name: str, table: Table, iteration: int) -> bool:
    """Log a table, and return whether the logger supports tables."""
    match logger:
        case TensorBoardLogger():
            logger.experiment.add_text(name, table.markdown, global_step=iteration)
        case MLFlowLogger():
            logger.experiment.log_text(logger.run_id, table.markdown, f"{name}/iteration_{iteration:06d}.md")
        case CometLogger():
            logger.experiment.log_text(table.markdown, step=iteration, metadata={"name": name})
        case DummyLogger():
            pass
        case _:
            log_text, args = getattr(logger, "log_text", None), (name, table.columns, table.rows)
            try:
                inspect.signature(log_text).bind(*args, step=iteration)  # type: ignore[arg-type]
            except (TypeError, ValueError):  # there is no such method, or it takes other arguments
                return False
            log_text(*args, step=iteration)  # type: ignore[misc]
    return True


def logger_states(loggers: Sequence[Logger], run: Path) -> list[dict[str, Any]]:
    """What a checkpoint records about each logger; call it on the first rank, where they are open."""
    return [{"class": type(logger).__name__, **state_of(logger, run)} for logger in loggers]


def resume_loggers(loggers: Sequence[Logger], states: Sequence[Mapping[str, Any]], run: Path) -> None:
    """Have each logger continue the curves that the checkpoint recorded for its class (the second logger of a class
    those of the second one, and so on). Call it before anything opens the loggers."""
    remaining = list(states)
    for logger in loggers:
        state = next((state for state in remaining if state["class"] == type(logger).__name__), None)
        if state is not None:
            remaining.remove(state)
            resume_logger(logger, state, run)


def log_table(loggers: Sequence[Logger], name: str, make: Callable[[], Table], iteration: int) -> list[str]:
    """Log a table to every logger, and return the class names of those that do not support tables."""
    table = make() if loggers else Table([], [], "")
    return [type(logger).__name__ for logger in loggers if not _log_table(logger, name, table, iteration)]


def places(loggers: Sequence[Logger]) -> list[str]:
    """How to view the curves, one line per logger."""
    return [place for logger in loggers if (place := place_of(logger))]


def holds_a_run(logger: Logger) -> bool:
    """Whether opening this logger would append to, or remove, the existing curves of another run."""
    if isinstance(logger, CSVLogger):
        return Path(logger.log_dir, METRICS).exists()
    return isinstance(logger, TensorBoardLogger) and any(Path(logger.log_dir).glob(EVENTS))


def _relative(folder: Path, run: Path) -> str:
    """``folder`` relative to the run's folder if it is inside, so that a run may be moved; otherwise absolute."""
    folder, run = folder.resolve(), run.resolve()
    return folder.relative_to(run).as_posix() if folder.is_relative_to(run) else str(folder)
