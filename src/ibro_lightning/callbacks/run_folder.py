"""The folder in which a run leaves everything: curves, rollouts, evaluations, checkpoints, model, summary."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_only


def run_folder(trainer: pl.Trainer) -> Path:
    """The logger's folder if there is one, otherwise the trainer's ``default_root_dir``."""
    return Path(trainer.log_dir or trainer.default_root_dir)


@rank_zero_only
def say(trainer: pl.Trainer, text: str) -> None:
    """Print without disturbing the progress bar."""
    bar = trainer.progress_bar_callback
    (bar.print if bar is not None else print)(text)


def write_json(path: Path, content: Any) -> Path:
    """Write whole or not at all: a reader, or a crash, never sees half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(content, indent=2) + "\n")
    os.replace(partial, path)
    return path
