"""Which checkpoint a command starts from, and a run folder as it was when that checkpoint was written."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities import rank_zero_info, rank_zero_only

from ibro_lightning.checkpoints import ABOUT, checkpoints_in, iteration_of, newest_valid, read_about, why_invalid
from ibro_lightning.errors import ConfigError
from ibro_lightning.guards.disk import PARTIAL
from ibro_lightning.run_folders import write_json
from ibro_lightning.seeding import run_seed

BY_NAME = ("last", "best")
END = Path("checkpoints", "end.json")
KEPT = ("rollouts", "checkpoints", "model")
"""Parts of a run's folder that the first iteration or a later one writes."""
_EVENTS = "events.out.tfevents.*"
_ITERATION = re.compile(r"iteration_(\d{6,})(?:_rank_\d+)?(?:\.json|\.parquet|\.\d+|\.\d+\.json)?")


def find_checkpoint(wanted: str, run: Path) -> Path | None:
    """The checkpoint that ``--ckpt_path`` means; None if it is ``last`` and the run has none.

    Args:
        wanted: a path, ``last`` (the newest that is whole) or ``best`` (of ``checkpoint.best``).
        run: the run's folder.

    Raises:
        ConfigError: there is no such checkpoint, or it is damaged.
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
    """Raise :class:`ConfigError` for a path that leads nowhere."""
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
            f"none of the {len(passed_over)} checkpoints in {run} is whole: leave it out to start anew",
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
    if not found or (reason := why_invalid(found[0])):
        raise ConfigError(
            "ckpt_path",
            "best",
            f"the best checkpoint was that of iteration {best}: {reason if found else 'it is gone'}",
        )
    rank_zero_info(f"the best checkpoint by {state['best']} ({values[best]:.4g}) is {found[0]}")
    return found[0]


def check_continues(checkpoint: Path, run: Path, algorithm: str) -> dict[str, Any]:
    """What the checkpoint says about itself, if training can go on from it in the folder ``run``.

    Raises:
        ConfigError: it is of another seed or algorithm, or newer ones lie beside it.
    """
    checkpoint = checkpoint.resolve()
    about: dict[str, Any] = read_about(checkpoint).get(ABOUT, {})
    if not about:
        return about
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
    if run.resolve() in checkpoint.parents:
        for newer in checkpoints_in(checkpoint.parent):
            if newer == checkpoint:
                break
            if why_invalid(newer) is None:
                raise ConfigError(
                    "ckpt_path",
                    str(checkpoint),
                    f"{newer.name} beside it is newer, and the folder would show two histories: write --ckpt_path last "
                    "or another trainer.default_root_dir, or remove the newer ones",
                )
    return about


@rank_zero_only
def wind_back(run: Path, about: Mapping[str, Any]) -> None:
    """Leave in ``run`` what was there when the checkpoint was written: nothing of later iterations, no torn file.

    What goes is made again, the same, by the run that continues. TensorBoard's files are cut to their length of then,
    so that no curve has a point twice.
    """
    remove_partial(run)
    (run / "hparams.yaml").unlink(missing_ok=True)  # Lightning writes it in place, and only if there is none
    if not about:
        return
    about = _with_end(run, about)
    if about["events"]:
        for path in run.glob(_EVENTS):
            size = about["events"].get(path.name)
            if size is None:
                path.unlink()
            elif path.stat().st_size > size:
                os.truncate(path, size)
    # Nor an unfinished evaluation after training: begun anew, it has the same curves as any other.
    for name, done in (
        ("rollouts", about["iteration"]),
        ("evaluations", about["iteration"] - (not about["evaluated"])),
    ):
        for path in run.glob(f"{name}/*"):
            match = _ITERATION.fullmatch(path.name)
            if match is not None and int(match[1]) > done:
                _remove(path)


@rank_zero_only
def note_end(run: Path, iteration: int) -> None:
    """A run has come to its end, its last evaluation included, which no checkpoint knows of: a run that goes on from
    there keeps it."""
    if (run / "checkpoints").is_dir():
        sizes = {path.name: path.stat().st_size for path in run.glob(_EVENTS)}
        write_json(run / END, {"iteration": iteration, "evaluated": True, "events": sizes})


def _with_end(run: Path, about: Mapping[str, Any]) -> dict[str, Any]:
    """``about`` with what came after that checkpoint before the run ended, if it ended there."""
    end = json.loads((run / END).read_text()) if (run / END).exists() else {}
    return {**about, **(end if end.get("iteration") == about["iteration"] else {})}


def evaluation_of(run: Path, about: Mapping[str, Any], iteration: int) -> Any:
    """The results of the evaluation that the checkpoint came after, if training ended there; otherwise None."""
    if about and about["iteration"] == iteration and _with_end(run, about)["evaluated"]:
        path = _evaluation(run, iteration)
        return json.loads(path.read_text()) if path.exists() else None
    return None


def _evaluation(run: Path, iteration: int) -> Path:
    return run / "evaluations" / f"iteration_{iteration:06d}.json"


def forget_beginning(run: Path) -> bool:
    """Make way for a run that starts anew where an earlier one was killed within its first iteration. False if there is
    more than that: it is not for us to remove."""
    if not (run / "config.yaml").exists() or any(any(run.glob(f"{kept}/*")) for kept in KEPT):
        return False
    remove_partial(run)
    _remove_logs(run)
    return True


@rank_zero_only
def _remove_logs(run: Path) -> None:
    for path in [*run.glob(_EVENTS), *run.glob("hparams.yaml")]:
        path.unlink()


@rank_zero_only
def remove_partial(run: Path) -> None:
    """Remove what a killed run was writing, files and folders."""
    for path in sorted(run.rglob(f"*{PARTIAL}")):
        _remove(path)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
