"""The manifest of a sharded checkpoint, written last: size and digest of each file, and a digest of the list itself.

The digest is SHA-256, which processors accelerate: half a second of one core per GiB, less than BLAKE2b.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from ibro_lightning.guards.disk import written_atomically
from ibro_lightning.runs.run_files import is_shard

MANIFEST = "manifest.json"
DIGEST = "sha256"
THREADS = 4
"""How many files one process reads at a time."""


def write_manifest(folder: Path, digests: Mapping[str, str]) -> None:
    """Write the manifest, without which ``folder`` is not a checkpoint, when everything else is there. Files without a
    digest in ``digests`` are read."""
    files = {
        path.name: _described(path, digests.get(path.name))
        for path in sorted(folder.iterdir())
        if is_shard(path.name) and path.name != MANIFEST  # other files are not the checkpoint's
    }
    with written_atomically(folder / MANIFEST) as partial:
        partial.write_text(_text(files))


def updated_manifest(folder: Path, name: str, *, listed: bool) -> str:
    """The manifest of ``folder`` with a new entry for its file ``name`` or, while that is replaced, without one."""
    files: dict[str, Any] = json.loads((folder / MANIFEST).read_text())["files"]
    files.pop(name, None)
    return _text({**files, name: _described(folder / name)} if listed else files)


def why_differs(folder: Path, share: int = 0, shares: int = 1) -> str | None:
    """How a checkpoint's files differ from its manifest, in a few words, or None. Compares all sizes, but reads only
    every ``shares``-th file, beginning with number ``share``."""
    try:
        text = (folder / MANIFEST).read_text()
        entries: dict[str, Any] = json.loads(text)["files"]
        files = {name: _entry(entry) for name, entry in entries.items()}
    except FileNotFoundError:
        return "this folder is not a checkpoint, or only a part of one"
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"its {MANIFEST} is damaged"
    if any(digest is not None for _, digest in files.values()) and text != _text(entries):
        return f"its {MANIFEST} is damaged: it does not match its own digest"
    for name, (size, _) in files.items():
        file = folder / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != size:
            return f"{name} has {file.stat().st_size} bytes instead of {size}"
    own = sorted((name, digest) for name, (_, digest) in files.items() if digest is not None)[share::shares]
    with ThreadPoolExecutor(THREADS) as pool:  # hashing releases the GIL
        matches = list(pool.map(lambda entry: digest_of(folder / entry[0]) == entry[1], own))
    wrong = [name for (name, _), same in zip(own, matches, strict=True) if not same]
    return f"{wrong[0]} is damaged: it does not match its digest" if wrong else None


def _described(path: Path, digest: str | None = None) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, DIGEST: digest or digest_of(path)}


def digest_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, DIGEST).hexdigest()


def _entry(entry: Any) -> tuple[int, str | None]:
    """``(bytes, digest)``; earlier versions recorded only the size."""
    return (entry, None) if isinstance(entry, int) else (int(entry["bytes"]), str(entry[DIGEST]))


def _text(files: Mapping[str, Any]) -> str:
    """The manifest's exact content, so that any flipped bit is noticed."""
    digest = hashlib.new(DIGEST, json.dumps(files, sort_keys=True).encode()).hexdigest()
    return json.dumps({"files": files, DIGEST: digest}, indent=2) + "\n"
