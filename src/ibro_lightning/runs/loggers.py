"""What a run needs of its loggers beyond Lightning's interface: where the curves are, how they resume, text tables.

A logger chooses where it keeps its files, independently of :func:`.run_folder`. Each class here supports one of
Lightning's loggers. Any other logger gets metrics, and tables if it has W&B's ``log_text``.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from lightning.pytorch.loggers import CometLogger, CSVLogger, Logger, MLFlowLogger, TensorBoardLogger, WandbLogger
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.utilities import rank_zero_info

from ibro_lightning.runs.curve_files import EVENTS, METRICS, open_csv, read_rows


@dataclass(frozen=True)
class Table:
    """Rows of text under named columns."""

    columns: list[str]
    rows: list[list[str]]
    markdown: str
    """The same table, for loggers that render Markdown."""


class Curves:
    """The curves of a logger of which only Lightning's interface is known."""

    kind: ClassVar[type[Any]] = Logger

    def __init__(self, logger: Logger) -> None:
        self.logger: Any = logger

    def state(self, run: Path) -> dict[str, Any]:
        """Flush the logger and return what a checkpoint records: where the curves currently end."""
        return {}

    def resume(self, state: Mapping[str, Any], run: Path) -> None:
        """Continue the curves that ``state`` describes; the logger must not have been opened yet."""
        name = type(self.logger).__name__
        rank_zero_info(f"{name} resumes by its own settings, and may show iterations after the checkpoint twice")

    def place(self) -> str | None:
        """How to view the curves; None if there are none."""
        where = getattr(self.logger, "log_dir", None) or self.logger.save_dir
        return type(self.logger).__name__ + (f" in {where}" if where else "")

    def log_table(self, name: str, table: Table, iteration: int) -> bool:
        """Log the table, and return whether the logger supports tables."""
        log_text, args = getattr(self.logger, "log_text", None), (name, table.columns, table.rows)
        try:
            inspect.signature(log_text).bind(*args, step=iteration)  # type: ignore[arg-type]
        except (TypeError, ValueError):  # there is no such method, or it takes other arguments
            return False
        log_text(*args, step=iteration)  # type: ignore[misc]
        return True


class TensorBoardCurves(Curves):
    """Event files only grow, so their sizes tell what belongs to a checkpoint."""

    kind = TensorBoardLogger

    def state(self, run: Path) -> dict[str, Any]:
        self.logger.experiment.flush()
        folder = Path(self.logger.log_dir)
        sizes = {path.name: path.stat().st_size for path in folder.glob(EVENTS)}
        return {"version": self.logger.version, "folder": _relative(folder, run), "events": sizes}

    def resume(self, state: Mapping[str, Any], run: Path) -> None:
        _set_version(self.logger, state)

    def place(self) -> str | None:
        return f"tensorboard --logdir {self.logger.log_dir}"

    def log_table(self, name: str, table: Table, iteration: int) -> bool:
        self.logger.experiment.add_text(name, table.markdown, global_step=iteration)
        return True


class CSVCurves(Curves):
    """``metrics.csv`` is rewritten when a new metric appears, but its rows keep their order."""

    kind = CSVLogger

    def state(self, run: Path) -> dict[str, Any]:
        self.logger.save()
        path = Path(self.logger.log_dir, METRICS)
        rows = len(read_rows(path)[1]) if path.exists() else 0
        return {"version": self.logger.version, "folder": _relative(path.parent, run), "rows": rows}

    def resume(self, state: Mapping[str, Any], run: Path) -> None:
        _set_version(self.logger, state)
        if Path(self.logger.log_dir).resolve() == (run / state["folder"]).resolve():
            open_csv(self.logger)

    def place(self) -> str | None:
        return str(Path(self.logger.log_dir, METRICS))


class WandbCurves(Curves):
    """Resumes by the W&B run's id; W&B cannot delete points."""

    kind = WandbLogger

    def state(self, run: Path) -> dict[str, Any]:
        return {"run": self.logger.version}

    def resume(self, state: Mapping[str, Any], run: Path) -> None:
        if self.logger.version is None:  # the user set no id; W&B's "resume" is "allow" by default
            self.logger._id = self.logger._wandb_init["id"] = state["run"]

    def place(self) -> str | None:
        experiment = self.logger.experiment
        if url := getattr(experiment, "url", None):
            return str(url)
        folder = getattr(experiment, "dir", None)
        return f"wandb sync {Path(folder).parent}" if folder else None

    def log_table(self, name: str, table: Table, iteration: int) -> bool:
        self.logger.log_text(name, columns=table.columns, data=table.rows, step=iteration)
        return True


class MLFlowCurves(Curves):
    """Resumes by the MLflow run's id; MLflow cannot delete points."""

    kind = MLFlowLogger

    def state(self, run: Path) -> dict[str, Any]:
        return {"run": self.logger.run_id}

    def resume(self, state: Mapping[str, Any], run: Path) -> None:
        if self.logger._run_id is None:
            self.logger._run_id = state["run"]

    def place(self) -> str | None:
        return f"mlflow ui --backend-store-uri {self.logger._tracking_uri}  (run {self.logger.run_id})"

    def log_table(self, name: str, table: Table, iteration: int) -> bool:
        self.logger.experiment.log_text(self.logger.run_id, table.markdown, f"{name}/iteration_{iteration:06d}.md")
        return True


class CometCurves(Curves):
    """Cannot resume: the logger's constructor starts an experiment, before the checkpoint is known."""

    kind = CometLogger

    def state(self, run: Path) -> dict[str, Any]:
        return {"run": self.logger.version}

    def resume(self, state: Mapping[str, Any], run: Path) -> None:
        if self.logger.version != state["run"]:
            remedy = f"to continue the run's own, write its experiment_key: {state['run']}"
            rank_zero_info(f"CometLogger has started a new experiment; {remedy}")

    def place(self) -> str | None:
        url = getattr(self.logger.experiment, "url", None)
        return str(url) if url else None

    def log_table(self, name: str, table: Table, iteration: int) -> bool:
        self.logger.experiment.log_text(table.markdown, step=iteration, metadata={"name": name})
        return True


class NoCurves(Curves):
    """Lightning's substitute for a logger in ``fast_dev_run``."""

    kind = DummyLogger

    def resume(self, state: Mapping[str, Any], run: Path) -> None:
        pass

    def place(self) -> str | None:
        return None

    def log_table(self, name: str, table: Table, iteration: int) -> bool:
        return True


_KINDS: tuple[type[Curves], ...] = (TensorBoardCurves, CSVCurves, WandbCurves, MLFlowCurves, CometCurves, NoCurves)


def curves_of(logger: Logger) -> Curves:
    """The :class:`Curves` for the class of ``logger``."""
    return next((kind for kind in _KINDS if isinstance(logger, kind.kind)), Curves)(logger)


def logger_states(loggers: Sequence[Logger], run: Path) -> list[dict[str, Any]]:
    """What a checkpoint records about each logger; call it on the first rank, where they are open."""
    return [{"class": type(logger).__name__, **curves_of(logger).state(run)} for logger in loggers]


def resume_loggers(loggers: Sequence[Logger], states: Sequence[Mapping[str, Any]], run: Path) -> None:
    """Have each logger continue the curves that the checkpoint recorded for its class (the second logger of a class
    those of the second one, and so on). Call it before anything opens the loggers."""
    remaining = list(states)
    for logger in loggers:
        state = next((state for state in remaining if state["class"] == type(logger).__name__), None)
        if state is not None:
            remaining.remove(state)
            curves_of(logger).resume(state, run)


def log_table(loggers: Sequence[Logger], name: str, make: Callable[[], Table], iteration: int) -> list[str]:
    """Log a table to every logger, and return the class names of those that do not support tables."""
    table = make() if loggers else Table([], [], "")
    return [type(logger).__name__ for logger in loggers if not curves_of(logger).log_table(name, table, iteration)]


def places(loggers: Sequence[Logger]) -> list[str]:
    """How to view the curves, one line per logger."""
    return [place for logger in loggers if (place := curves_of(logger).place())]


def holds_a_run(logger: Logger) -> bool:
    """Whether opening this logger would append to, or remove, the existing curves of another run."""
    if isinstance(logger, CSVLogger):
        return Path(logger.log_dir, METRICS).exists()
    return isinstance(logger, TensorBoardLogger) and any(Path(logger.log_dir).glob(EVENTS))


def _set_version(logger: Any, state: Mapping[str, Any]) -> None:
    """Reuse the recorded version, unless the settings name one: by default the logger takes the next free one."""
    if logger._version is None:
        logger._version = state["version"]


def _relative(folder: Path, run: Path) -> str:
    """``folder`` relative to the run's folder if it is inside, so that a run may be moved; otherwise absolute."""
    folder, run = folder.resolve(), run.resolve()
    return folder.relative_to(run).as_posix() if folder.is_relative_to(run) else str(folder)
