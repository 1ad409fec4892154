"""The curves of a run, read from the files of its TensorBoard or CSV logger."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from ibro_lightning.errors import ConfigError
from ibro_lightning.runs.run_files import EVENTS, METRICS


class Point(NamedTuple):
    """A point of a curve."""

    metric: str
    """Name of the curve, such as ``val/number_path/avg@16``."""
    iteration: int
    """0 is before training."""
    value: float


def read_curves(run_folder: Path) -> list[Point]:
    """All points of a run's curves, sorted by metric and iteration, each once: where a resumed run wrote a point again,
    the later one counts. Values are float32 in TensorBoard's files and exact in CSV files, which are read if there are
    no others. Points that are not finite, text tables and histograms are left out, and so is an incomplete end, which a
    killed run leaves.

    Raises:
        ConfigError: there are no curves in the folder, or they cannot be read.
    """
    points: dict[tuple[str, int], float] = {}
    for pattern, read in ((EVENTS, _events), (METRICS, _rows)):
        for path in _files(run_folder, pattern) if not points else ():
            try:
                points.update((key, value) for key, value in read(path) if math.isfinite(value))
            except (OSError, ValueError, KeyError, TypeError) as error:
                raise ConfigError("run", str(path), f"these curves cannot be read: {error}") from error
    if not points:
        remedy = "no curves are there: train with a TensorBoardLogger, as by default, or a CSVLogger"
        raise ConfigError("run", str(run_folder), remedy)
    return [Point(metric, iteration, points[metric, iteration]) for metric, iteration in sorted(points)]


def _files(folder: Path, pattern: str) -> list[Path]:
    """A run's own files, the oldest first, or else those of a logger in a folder below. Evaluations after training have
    curves of their own, which are not the run's."""
    own = sorted(folder.glob(pattern))
    below = (path for path in folder.rglob(pattern) if "evaluations" not in path.relative_to(folder).parts)
    return own or sorted(below, key=lambda path: path.name)


def _events(path: Path) -> Iterator[tuple[tuple[str, int], float]]:
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
    from tensorboard.util.tensor_util import make_ndarray

    for event in EventFileLoader(str(path)).Load():
        for value in event.summary.value:
            if value.metadata.plugin_data.plugin_name == "scalars" and value.HasField("tensor"):
                yield (value.tag, int(event.step)), float(make_ndarray(value.tensor).item())


def _rows(path: Path) -> Iterator[tuple[tuple[str, int], float]]:
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            for metric, text in row.items():
                if metric not in ("step", "epoch") and text:
                    yield (metric, int(row["step"])), float(text)
