"""The description of a folder of samples, which is a file beside them; read without torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ibro_lightning.guards.disk import write_json

MANIFEST = "_manifest.json"
"""Describes the samples of an evaluation. Readers of parquet folders skip names that begin with "_"."""


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The description of a folder's samples; None if there is none."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
    except (OSError, ValueError):
        return None
    return manifest if isinstance(manifest, dict) else None


def mark_complete(folder: Path) -> None:
    """Record that the results are written, so that the next evaluation in this folder starts over."""
    if (manifest := read_manifest(folder)) is not None:
        write_json(folder / MANIFEST, {**manifest, "complete": True})
