"""The folder in which a run leaves everything: curves, rollouts, evaluations, checkpoints, model, summary.

No two runs share a folder: an earlier one is moved aside, and comes back if the new one is refused.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only

from ibro_lightning.errors import ConfigError
from ibro_lightning.guards.disk import written_whole

HEADER = "# ibro_lightning"
"""How the ``config.yaml`` of a run begins."""


def run_folder(trainer: pl.Trainer) -> Path:
    """The logger's folder if there is one, otherwise the trainer's ``default_root_dir``; any rank may ask."""
    # Not trainer.log_dir, which is a broadcast: all ranks would have to ask for it at the same time.
    folder = None if trainer.logger is None else trainer.logger.log_dir or trainer.logger.save_dir
    return Path(folder or trainer.default_root_dir)


def evaluation_name(trainer: pl.Trainer) -> str:
    """What the evaluation that is running is called: ``iteration_000020`` in training, otherwise the command."""
    if trainer.testing:
        return "test"
    iteration = 0 if trainer.sanity_checking else trainer.fit_loop.epoch_loop.total_batch_idx + 1
    return f"iteration_{iteration:06d}" if iteration or trainer.sanity_checking else "validate"


def write_json(path: Path, content: Any) -> Path:
    """Write whole or not at all: a reader, or a crash, never sees half a file.

    Raises:
        DiskFullError: there is no room for it.
    """
    with written_whole(path) as partial:
        partial.write_text(json.dumps(content, indent=2) + "\n")
    return path


def free_name(path: Path, *suffixes: str) -> Path:
    """``path`` with the first number behind it that is not taken, with any of the suffixes neither:
    ``runs/quickstart.1``."""
    number = 1
    while any(path.with_name(f"{path.name}.{number}{suffix}").exists() for suffix in ("", *suffixes)):
        number += 1
    return path.with_name(f"{path.name}.{number}")


@rank_zero_only
def make_room(folder: Path, needed: Iterable[Path]) -> Path | None:
    """Move an earlier run out of the way, so that no two runs share a folder; returns where it went.

    Args:
        needed: folders that the new run starts from, which must stay where they are.

    Raises:
        ConfigError: the folder cannot be one, or holds the policy that the new run starts from.
    """
    for part in (folder, *folder.parents):
        if part.exists() and not part.is_dir():
            raise ConfigError("trainer.default_root_dir", str(folder), f"{part} is a file: write another folder")
    if folder.resolve() in (Path.cwd(), *Path.cwd().parents):
        raise ConfigError("trainer.default_root_dir", str(folder), "a run needs a folder of its own, such as runs/mine")
    config = folder / "config.yaml"
    if not config.exists():
        return None
    if not config.read_text().startswith(HEADER):
        raise ConfigError(
            "trainer.default_root_dir", str(folder), "its config.yaml is none of ours: write another folder for the run"
        )
    if inside := [source for source in needed if folder.resolve() in source.parents]:
        raise ConfigError(
            "trainer.default_root_dir",
            str(folder),
            f"it holds the run that this run starts from ({inside[0]}): write another folder for the new run",
        )
    aside = free_name(folder)
    folder.rename(aside)
    rank_zero_info(f"an earlier run was in {folder}: moved to {aside}")
    return aside


@rank_zero_only
def put_back(folder: Path, aside: Path | None) -> None:
    """Leave no trace of a run that was refused before it computed anything; undo :func:`make_room`."""
    if any((folder / name).exists() for name in ("rollouts", "evaluations", "checkpoints")):
        return
    shutil.rmtree(folder, ignore_errors=True)
    if aside is not None:
        aside.rename(folder)
        rank_zero_info(f"the new run was refused: {aside} is back in {folder}")
