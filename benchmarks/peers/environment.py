"""TRL's own environment: made once, and used again while its pins are the same."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

PINS = ("torch==2.13.0", "trl==1.16.0", "transformers==5.19.0", "datasets==5.2.0", "cloudpickle==3.1.2")
"""torch is installed first and by itself: a resolver that sees it beside the others may take another build. cloudpickle
is what importing our verifier needs beyond what TRL brings."""


def default_folder() -> Path:
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "ibro_lightning" / "trl"


def environment(folder: Path | None = None) -> Path:
    """The interpreter of an environment with :data:`PINS`, in ``folder`` or a cache folder, made if it is not there."""
    folder = (folder or default_folder()).resolve()
    python, mark = folder / "bin" / "python", folder / "pins.txt"
    if mark.exists() and mark.read_text() == "\n".join(PINS):
        return python
    print(f"making TRL's environment in {folder}", flush=True)
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    for pins in (PINS[:1], PINS):
        subprocess.run([str(python), "-m", "pip", "install", "--quiet", *pins], check=True)
    mark.write_text("\n".join(PINS))  # last: an installation that was broken off is continued
    return python
