"""One section of ``gpu_check.py``: ``python -m gpu.section NAME FILE [miniature]``."""

from __future__ import annotations

import sys
from pathlib import Path

from gpu.report import Figures


def main(name: str, file: str, size: str = "") -> None:
    figures, miniature = Figures(Path(file)), size == "miniature"
    if name == "machine":
        from gpu import hardware

        with figures.guarded("machine") as row:
            row |= hardware.description()
    elif name == "head":
        from gpu import head

        head.measure(figures, miniature)
    else:
        from gpu import training

        training.measure(name, figures, miniature, Path(file).parent)
    if all("failed" in row for row in figures.rows.values()):
        raise SystemExit(1)


if __name__ == "__main__":
    main(*sys.argv[1:])
