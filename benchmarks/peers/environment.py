"""Peers' own environments: made once, and used again while their pins are the same."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

PINS = ("torch==2.13.0", "trl==1.16.0", "transformers==5.19.0", "datasets==5.2.0", "cloudpickle==3.1.2")
"""torch is installed first and by itself: a resolver that sees it beside the others may take another build. cloudpickle
is what importing our verifier needs beyond what TRL brings."""


def default_folder(name: str = "trl") -> Path:
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "ibro_lightning" / name


def environment(folder: Path | None = None, pins: Sequence[str] | None = None) -> Path:
    """The interpreter of an environment with ``pins``, in ``folder`` or a cache folder, made if it is not there. TRL's
    :data:`PINS` if None."""
    pins = pins or PINS
    folder = (folder or default_folder()).resolve()
    python, mark = folder / "bin" / "python", folder / "pins.txt"
    if mark.exists() and mark.read_text() == "\n".join(pins):
        return python
    print(f"making an environment with {', '.join(pins[1:])} in {folder}", flush=True)
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    for chosen in (pins[:1], pins):
        subprocess.run([str(python), "-m", "pip", "install", "--quiet", *chosen], check=True)
    mark.write_text("\n".join(pins))  # last: an installation that was broken off is continued
    return python
