#!/usr/bin/env bash
# lightning 2.6.6: CSVLogger(version="run"), opened a second time on the same folder, as a resumed job opens it.
# Guess: it appends, as TensorBoardLogger with the same version does; or it raises, as the folder is not empty.
# What happens: metrics.csv of the first run is deleted as soon as the logger is used, with a warning; the second run's rows
# are all that is left. Steps 1 to 3 are gone for a job that goes on from step 3.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet torch==2.13.0 numpy==2.4.6 lightning==2.6.6
"$work/venv/bin/python" -W ignore - "$work" 2>/dev/null <<'PY'
import csv
import sys
from pathlib import Path

import lightning
from lightning.pytorch.loggers import CSVLogger

work = Path(sys.argv[1]) / "logs"


def steps_after(first, last):
    logger = CSVLogger(work, name="", version="run")
    for step in range(first, last + 1):
        logger.log_metrics({"loss": 1 / step}, step=step)
    logger.finalize("success")
    with open(work / "run" / "metrics.csv") as file:
        return [int(row["step"]) for row in csv.DictReader(file)]


before, after = steps_after(1, 3), steps_after(4, 5)
print(f"lightning {lightning.__version__}")
print(f"steps in metrics.csv after the first job: {before}, after the job that goes on: {after}")
assert before == [1, 2, 3]
assert after == [4, 5], after
PY
echo "still so"
