"""Truncates the files of TensorBoard and CSV loggers to what they held when a checkpoint was written.

torch's own ``SummaryWriter(purge_step=…)`` keeps later points and only marks them as void. TensorBoard then hides the
scalars, unless ``purge_orphaned_data`` is off, but shows text tables twice; and other readers of event files
(``EventFileLoader``, exporters) see all such points twice. Truncation removes them for every reader. Loggers that keep
their curves elsewhere (W&B, MLflow, Comet) are not covered: they cannot delete points.
"""

from __future__ import annotations

import csv
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities import rank_zero_only

from ibro_lightning.guards.disk import written_atomically
from ibro_lightning.runs.run_files import EVENTS, METRICS

_KEPT = METRICS + ".kept"
"""The temporary name of a CSV file while its logger opens, as that removes an existing file."""


@rank_zero_only
def cut_back(
    states: Sequence[Mapping[str, Any]], run: Path, is_own: Callable[[Path], bool] = lambda path: True
) -> None:
    """Truncate the files of TensorBoard and CSV loggers to what they held when the checkpoint recorded their
    ``states``. Event files of the run (``is_own``) that the checkpoint does not list are newer, and removed."""
    for state in states:
        if "events" in state:
            # A folder outside the run's, without a version of its own, may be shared with other runs.
            alone = bool(state["version"]) or not Path(state["folder"]).is_absolute()
            cut_events(run / state["folder"], state["events"], alone=alone, is_own=is_own)
        elif "rows" in state:
            cut_rows(run / state["folder"] / METRICS, state["rows"])


def cut_events(
    folder: Path, sizes: Mapping[str, int], *, alone: bool, is_own: Callable[[Path], bool] = lambda path: True
) -> None:
    """Truncate event files to their ``sizes`` in bytes.

    Args:
        alone: the folder holds nothing but this run's curves: files without a size are newer, and removed.
        is_own: a further condition for the removal of a file.
    """
    for path in folder.glob(EVENTS):
        size = sizes.get(path.name)
        if size is not None and path.stat().st_size > size:
            os.truncate(path, size)
        elif size is None and alone and sizes and is_own(path):
            path.unlink()


def cut_rows(path: Path, rows: int) -> None:
    """Truncate a CSV file to its first ``rows`` rows."""
    kept = path.with_name(_KEPT)
    if kept.exists() and not path.exists():  # killed while its logger opened
        kept.rename(path)
    if not path.exists():
        return
    header, lines = read_rows(path)
    if len(lines) > rows:
        with written_atomically(path) as partial, partial.open("w", newline="") as file:
            csv.writer(file).writerows([header, *lines[:rows]])


def read_rows(path: Path) -> tuple[list[str], list[list[str]]]:
    """Header and rows, without the incomplete last row of a killed run."""
    with path.open(newline="") as file:
        lines = list(csv.reader(file))
    header = lines[0] if lines else []
    return header, [line for line in lines[1:] if len(line) == len(header)]


@rank_zero_only
def open_csv(logger: CSVLogger) -> None:
    """Open a logger whose file exists, which it would otherwise remove."""
    path, kept = Path(logger.log_dir, METRICS), Path(logger.log_dir, _KEPT)
    if not path.exists():
        return
    os.replace(path, kept)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Experiment logs directory")
            logger.experiment.metrics_keys = read_rows(kept)[0]
    finally:
        os.replace(kept, path)
