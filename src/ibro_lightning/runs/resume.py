"""Finds the checkpoint that a command starts from, and restores the run's folder to the time of that checkpoint."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only

from ibro_lightning.errors import ConfigError
from ibro_lightning.guards.disk import write_json
from ibro_lightning.runs.authorship import leave_to_others
from ibro_lightning.runs.checkpoints import (
    ABOUT,
    Written,
    checkpoints_in,
    iteration_of,
    newer_valid,
    newest_valid,
    read_about,
    why_invalid,
)
from ibro_lightning.runs.claims import survey
from ibro_lightning.runs.contents import MARK, is_unfinished
from ibro_lightning.runs.curve_files import cut_back
from ibro_lightning.runs.loggers import logger_states
from ibro_lightning.runs.marks import Mark, read_mark
from ibro_lightning.runs.model_folders import remove
from ibro_lightning.seeding import run_seed
from ibro_lightning.version import __version__

BY_NAME = ("last", "best")
END = Path("checkpoints", "end.json")
KEPT = ("rollouts", "checkpoints", "model")
"""Parts of a run's folder that exist only once an iteration is complete."""
_ITERATION = re.compile(r"(rollouts|evaluations)/iteration_(\d{6,})(?!\d).*")


def find_checkpoint(wanted: str, run: Path) -> Path | None:
    """The checkpoint for a value of ``--ckpt_path``; None for ``last`` if the run has none.

    Args:
        wanted: a path, ``last`` (the newest valid one) or ``best`` (by ``checkpoint.best``).
        run: the run's folder.

    Raises:
        ConfigError: the checkpoint does not exist or is damaged.
    """
    if wanted in BY_NAME:
        found = _newest(run, wanted) if wanted == "last" else _best(run)
        return found and found.resolve()
    check_exists(wanted)
    path = Path(wanted).resolve()
    if (reason := why_invalid(path)) is not None:
        whole, _ = newest_valid(path.parent)
        remedy = f": the newest whole one beside it is {Path(wanted).parent / whole.name}" if whole else ""
        raise ConfigError("ckpt_path", wanted, f"{reason}{remedy}")
    return path


def check_exists(wanted: str) -> None:
    """Raise :class:`ConfigError` for a path that does not exist."""
    if wanted not in BY_NAME and not Path(wanted).exists():
        raise ConfigError("ckpt_path", wanted, "no such checkpoint: look in checkpoints/ of the run's folder")


def _newest(run: Path, wanted: str) -> Path | None:
    found, passed_over = newest_valid(run / "checkpoints")
    for path, reason in passed_over.items():
        rank_zero_info(f"passed over {path}: {reason}")
    if found is None and passed_over:
        raise ConfigError(
            "ckpt_path",
            wanted,
            f"none of the {len(passed_over)} checkpoints in {run} is whole and of this run: leave it out to start anew",
        )
    if found is not None and wanted == "last":
        rank_zero_info(f"the newest whole checkpoint is {found}")
    return found


def _best(run: Path) -> Path:
    newest = _newest(run, "best")
    state: dict[str, Any] = {} if newest is None else read_about(newest)["callbacks"].get("IterationCheckpoint", {})
    values: dict[int, float] = state.get("values", {})
    if newest is None or not values:
        raise ConfigError(
            "ckpt_path",
            "best",
            f"no checkpoint in {run} counts as the best: train with checkpoint.best, or name a file",
        )
    sign = 1 if state["mode"] == "max" else -1
    best = max(values, key=lambda iteration: (sign * values[iteration], -iteration))
    found = [path for path in checkpoints_in(newest.parent) if iteration_of(path) == best]
    if not found or (reason := why_invalid(found[0]) or Written(newest.parent).why_foreign(found[0])):
        raise ConfigError(
            "ckpt_path",
            "best",
            f"the best checkpoint was that of iteration {best}: {reason if found else 'it is gone'}",
        )
    rank_zero_info(f"the best checkpoint by {state['best']} ({values[best]:.4g}) is {found[0]}")
    return found[0]


def check_continues(checkpoint: Path, run: Path, algorithm: str) -> dict[str, Any]:
    """Check that training can resume from a checkpoint in the folder ``run``, and return the checkpoint's description.

    Raises:
        ConfigError: it is of another seed or algorithm, or there are newer ones beside it.
    """
    checkpoint = checkpoint.resolve()
    about: dict[str, Any] = read_about(checkpoint).get(ABOUT, {})
    if not about:
        return about
    if about["version"] != __version__:
        rank_zero_info(f"{checkpoint} is of ibro_lightning {about['version']}, this is {__version__}")
    if about["algorithm"] != algorithm:
        raise ConfigError(
            "ckpt_path",
            str(checkpoint),
            f"it is of a run with {about['algorithm']}, this one has {algorithm}: to start from its weights, write the "
            "folder that `export` makes of it as model.policy",
        )
    if about["seed"] != run_seed():
        raise ConfigError(
            "seed_everything",
            run_seed(),
            f"the run that {checkpoint} is of has {about['seed']}: write that, as prompts and samples depend on it",
        )
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
    about = _with_end(run, about)
    cut_back(about.get("loggers", ()), run, lambda path: mark is None or _is_runs(mark, run, path))
    # An unfinished evaluation after training goes, too: it starts anew, with the same curves as any other.
    done = {"rollouts": about["iteration"], "evaluations": about["iteration"] - (not about["evaluated"])}
    later = ((path, _ITERATION.fullmatch(path)) for path in own)
    again = [path for path, match in later if match is not None and int(match[2]) > done[match[1]]]
    remove(run, leave_to_others(run, again))


def _is_runs(mark: Mark, run: Path, path: Path) -> bool:
    """Whether an event file is the run's. Outside the run's folder, all of a logger's folder is."""
    inside = path.resolve().is_relative_to(run.resolve())
    return not inside or mark.owns(run, path.resolve().relative_to(run.resolve()).as_posix())


@rank_zero_only
def note_end(run: Path, iteration: int, loggers: Sequence[Logger]) -> None:
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
    for logger in loggers:
        for folder in (getattr(logger, "log_dir", None), logger.save_dir):
            if (
                folder
                and Path(folder).resolve() != run.resolve()
                and (found := checkpoints_in(Path(folder, "checkpoints")))
            ):
                return found[0]
    return None


def _with_end(run: Path, about: Mapping[str, Any]) -> dict[str, Any]:
    """``about``, updated by :func:`note_end` if the run ended at that checkpoint."""
    end = _end_of(run)
    return {**about, **(end if end.get("iteration") == about["iteration"] else {})}


def _end_of(run: Path) -> dict[str, Any]:
    """What :func:`note_end` recorded; empty if that is missing or damaged, as a resumed run can repeat its last
    evaluation."""
    try:
        end = json.loads((run / END).read_text())
        states = [state["class"] for state in end["loggers"]]
        if end["evaluated"] is not True or not all(isinstance(part, str) for part in states):
            raise ValueError("it holds something else")
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, LookupError, TypeError):
        _report_damaged(run / END)
        return {}
    return {name: end[name] for name in ("iteration", "evaluated", "loggers")}


@cache  # report it once
def _report_damaged(path: Path) -> None:
    rank_zero_info(f"{path} is damaged and does not count")


def evaluation_of(run: Path, about: Mapping[str, Any], iteration: int) -> Any:
    """The results of the evaluation at the checkpoint's iteration, if that is done; otherwise None."""
    if not about or about["iteration"] != iteration or not _with_end(run, about)["evaluated"]:
        return None
    path = _evaluation(run, iteration)
    try:
        return json.loads(path.read_text()) if path.exists() else None
    except (OSError, ValueError):
        rank_zero_info(f"{path} is damaged: evaluated again")
        return None


def _evaluation(run: Path, iteration: int) -> Path:
    return run / "evaluations" / f"iteration_{iteration:06d}.json"


def forget_beginning(run: Path) -> bool:
    """Remove the files of a run that was killed within its first iteration, so that a new one can start. False if the
    folder holds more than that, which is then kept."""
    mark = read_mark(run)
    if mark is None or not (run / "config.yaml").exists() or "config.yaml" not in mark.parts:
        return False
    if any(path.split("/")[0] in KEPT and not is_unfinished(path) for path in survey(run, mark).own):
        return False
    remove_partial(run)
    _remove_logs(run)
    leave_to_others(run, [path for path in survey(run, mark).own if _ITERATION.fullmatch(path)])
    return True


@rank_zero_only
def _remove_logs(run: Path) -> None:
    remove(run, [path for path in survey(run).own if path == "hparams.yaml" or path.startswith("events.")])


@rank_zero_only
def remove_partial(run: Path) -> None:
    """Remove our unfinished files and folders, left by a killed run; not the mark, which another command may be
    writing."""
    unfinished = [path for path in survey(run).own if is_unfinished(path) and not path.startswith(MARK)]
    remove(run, leave_to_others(run, unfinished))
