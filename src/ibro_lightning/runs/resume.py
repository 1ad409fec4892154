"""Finds the checkpoint that a command starts from, and restores the run's folder to the time of that checkpoint."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only

from ibro_lightning import __version__
from ibro_lightning.errors import ConfigError
from ibro_lightning.guards.disk import write_json
from ibro_lightning.runs.authorship import leave_to_others
from ibro_lightning.runs.checkpoints.catalog import Written, checkpoint_name, checkpoints_in, newer_valid, newest_valid
from ibro_lightning.runs.checkpoints.index import ABOUT
from ibro_lightning.runs.checkpoints.plugin import read_about
from ibro_lightning.runs.checkpoints.validity import why_invalid
from ibro_lightning.runs.claims import survey
from ibro_lightning.runs.curve_files import cut_back
from ibro_lightning.runs.loggers import logger_states
from ibro_lightning.runs.marks import read_mark
from ibro_lightning.runs.model_folders import remove
from ibro_lightning.runs.run_files import MARK, is_unfinished
from ibro_lightning.seeding import run_seed

BY_NAME = ("last", "best")
END = Path("checkpoints", "end.json")
KEPT = ("rollouts", "checkpoints", "model")
"""Parts of a run's folder that exist only once an iteration is complete."""
_ITERATION = re.compile(r"(rollouts|evaluations)/iteration_(\d{6,})(?!\d).*")


def find_checkpoint(ckpt_path: str, run: Path) -> Path | None:
    """The checkpoint for a value of ``--ckpt_path``; None for ``last`` if the run has none.

    Args:
        ckpt_path: a path, ``last`` (the newest valid one) or ``best`` (by ``checkpoint.best``).
        run: the run's folder.

    Raises:
        ConfigError: the checkpoint does not exist or is damaged.
    """
    if ckpt_path in BY_NAME:
        found = _newest(run, ckpt_path)
        if ckpt_path == "best":
            found = _best(run, found)
        elif found is not None:
            rank_zero_info(f"the newest valid checkpoint is {found}")
        return found and found.resolve()
    check_exists(ckpt_path)
    path = Path(ckpt_path).resolve()
    if (reason := why_invalid(path)) is not None:
        valid, _ = newest_valid(path.parent)
        remedy = f": the newest valid one beside it is {Path(ckpt_path).parent / valid.name}" if valid else ""
        raise ConfigError("ckpt_path", ckpt_path, f"{reason}{remedy}")
    return path


def check_exists(ckpt_path: str) -> None:
    """Raise :class:`ConfigError` for a path that does not exist."""
    if ckpt_path not in BY_NAME and not Path(ckpt_path).exists():
        raise ConfigError("ckpt_path", ckpt_path, "no such checkpoint: look in checkpoints/ of the run's folder")


def _newest(run: Path, ckpt_path: str) -> Path | None:
    found, skipped = newest_valid(run / "checkpoints")
    for path, reason in skipped.items():
        rank_zero_info(f"skipped {path}: {reason}")
    if found is None and skipped:
        remedy = f"none of the {len(skipped)} checkpoints in {run} is valid and of this run: leave it out to start over"
        raise ConfigError("ckpt_path", ckpt_path, remedy)
    return found


def _best(run: Path, newest: Path | None) -> Path:
    state: dict[str, Any] = {} if newest is None else read_about(newest)["callbacks"].get("IterationCheckpoint", {})
    values: dict[int, float] = state.get("values", {})
    if newest is None or not values:
        remedy = f"no checkpoint in {run} is marked as the best: train with checkpoint.best, or write a path"
        raise ConfigError("ckpt_path", "best", remedy)
    sign = 1 if state["mode"] == "max" else -1
    best = max(values, key=lambda iteration: (sign * values[iteration], -iteration))
    path = newest.parent / checkpoint_name(best)
    reason = why_invalid(path) or Written(newest.parent).why_foreign(path) if os.path.lexists(path) else "it is missing"
    if reason:
        raise ConfigError("ckpt_path", "best", f"the best checkpoint is that of iteration {best}: {reason}")
    rank_zero_info(f"the best checkpoint by {state['best']} ({values[best]:.4g}) is {path}")
    return path


def check_continues(checkpoint: Path, run: Path, algorithm: str) -> dict[str, Any]:
    """Return the description of a checkpoint, or raise :class:`ConfigError` if training cannot resume from it in the
    folder ``run``: it is of another seed or algorithm, or there are newer ones beside it."""
    checkpoint = checkpoint.resolve()
    about: dict[str, Any] = read_about(checkpoint).get(ABOUT, {})
    if not about:
        return about
    if about["version"] != __version__:
        rank_zero_info(f"{checkpoint} was written by ibro_lightning {about['version']}, this is {__version__}")
    if about["algorithm"] != algorithm:
        raise ConfigError(
            "ckpt_path",
            str(checkpoint),
            f"it is of a run with {about['algorithm']}, this one has {algorithm}: to start from its weights, write the "
            "folder that `export` makes of it as model.policy",
        )
    if about["seed"] != run_seed():
        remedy = f"the run of {checkpoint} has {about['seed']}: write that, as prompts and samples depend on it"
        raise ConfigError("seed_everything", run_seed(), remedy)
    if run.resolve() in checkpoint.parents and (newer := newer_valid(checkpoint)) is not None:
        raise ConfigError(
            "ckpt_path",
            str(checkpoint),
            f"{newer.name} beside it is newer, and the folder would show two histories: write --ckpt_path last "
            "or another trainer.default_root_dir, or remove the newer ones",
        )
    return about


@rank_zero_only
def wind_back(run: Path, about: Mapping[str, Any]) -> None:
    """Restore ``run`` to the time of the checkpoint: remove the files of later iterations and unfinished ones.

    The resumed run produces them again, identically. The files of TensorBoard and CSV loggers, wherever they are, are
    truncated to their length at that time, so that no curve has a point twice.
    """
    remove_partial(run)
    mark, own = read_mark(run), survey(run).own
    remove(run, [path for path in own if path == "hparams.yaml"])  # Lightning writes it only if it is missing
    if not about:
        return

    def is_own(path: Path) -> bool:
        """Whether an event file is the run's. Outside the run's folder, all of a logger's folder is."""
        path, inside = path.resolve(), run.resolve()
        return mark is None or not path.is_relative_to(inside) or mark.owns(run, path.relative_to(inside).as_posix())

    about = _with_end(run, about)
    cut_back(about.get("loggers", ()), run, is_own)
    # An unfinished evaluation after training is removed, too: it is repeated, with the same curves as any other.
    done = {"rollouts": about["iteration"], "evaluations": about["iteration"] - (not about["evaluated"])}
    later = ((path, _ITERATION.fullmatch(path)) for path in own)
    repeated = [path for path, match in later if match is not None and int(match[2]) > done[match[1]]]
    remove(run, leave_to_others(run, repeated))


@rank_zero_only
def record_end(run: Path, iteration: int, loggers: Sequence[Logger]) -> None:
    """Record that a run has ended, including its last evaluation, so that a resumed run keeps that. No checkpoint
    follows it."""
    if (run / "checkpoints").is_dir():
        states = logger_states(loggers, run)
        write_json(run / END, {"iteration": iteration, "evaluated": True, "loggers": states})


def logger_states_of(run: Path, about: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What the checkpoint recorded about its run's loggers, for :func:`.resume_loggers`."""
    return list(_with_end(run, about).get("loggers", ())) if about else []


def checkpoints_elsewhere(run: Path, loggers: Sequence[Logger]) -> Path | None:
    """A checkpoint in a logger's folder, where older versions wrote them and none is searched for, if there is one."""
    named = (folder for logger in loggers for folder in (getattr(logger, "log_dir", None), logger.save_dir) if folder)
    folders = [Path(folder) for folder in named if Path(folder).resolve() != run.resolve()]
    return next((path for folder in folders for path in checkpoints_in(folder / "checkpoints")), None)


def _with_end(run: Path, about: Mapping[str, Any]) -> dict[str, Any]:
    """``about``, updated by :func:`record_end` if the run ended at that checkpoint. A record that is missing or damaged
    does not matter, as a resumed run can repeat its last evaluation."""
    try:
        end = json.loads((run / END).read_text())
        states = [state["class"] for state in end["loggers"]]
        if end["evaluated"] is not True or not all(isinstance(part, str) for part in states):
            raise ValueError("it holds something else")
        end = {name: end[name] for name in ("iteration", "evaluated", "loggers")}
    except FileNotFoundError:
        return {**about}
    except (OSError, ValueError, LookupError, TypeError):
        _report_damaged(run / END)
        return {**about}
    return {**about, **(end if end["iteration"] == about["iteration"] else {})}


@cache  # report it once
def _report_damaged(path: Path) -> None:
    rank_zero_info(f"{path} is damaged and is ignored")


def evaluation_of(run: Path, about: Mapping[str, Any], iteration: int) -> Any:
    """The results of the evaluation at the checkpoint's iteration, if that is done; otherwise None."""
    if not about or about["iteration"] != iteration or not _with_end(run, about)["evaluated"]:
        return None
    path = run / "evaluations" / f"iteration_{iteration:06d}.json"
    try:
        return json.loads(path.read_text()) if path.exists() else None
    except (OSError, ValueError):
        rank_zero_info(f"{path} is damaged: the evaluation is repeated")
        return None


def forget_beginning(run: Path) -> bool:
    """Remove the files of a run that was killed within its first iteration, so that a new one can start. False if the
    folder holds more than that, which is then kept."""
    mark = read_mark(run)
    if mark is None or not (run / "config.yaml").exists() or "config.yaml" not in mark.parts:
        return False
    if any(path.split("/")[0] in KEPT and not is_unfinished(path) for path in survey(run, mark).own):
        return False
    remove_partial(run)
    own = survey(run, mark).own
    rank_zero_only(remove)(run, [path for path in own if path == "hparams.yaml" or path.startswith("events.")])
    leave_to_others(run, [path for path in own if _ITERATION.fullmatch(path)])
    return True


@rank_zero_only
def remove_partial(run: Path) -> None:
    """Remove our unfinished files and folders, left by a killed run; not the mark, which another command may be
    writing."""
    unfinished = [path for path in survey(run).own if is_unfinished(path) and not path.startswith(MARK)]
    remove(run, leave_to_others(run, unfinished))
