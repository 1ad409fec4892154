"""Model folders with a manifest, which tells our files from those that others put beside them.

A folder is written under a temporary name and renamed once it is complete. What was there before is moved aside, unless
this run wrote it and it is unchanged. Files that are not ours stay where they are.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from ibro_lightning import __version__
from ibro_lightning.guards.disk import PARTIAL, free_name, write_json
from ibro_lightning.ranks import rank_zero_info, rank_zero_warn

MANIFEST = "ibro_lightning.json"
OLD = ".old" + PARTIAL
_USUAL = re.compile(
    r"(?:.*/)?(?:[^/]*(?:config|token|vocab|merges|spiece|processor|feature_extractor|template|map|bpe|tekken)[^/]*"
    r"\.(?:json|txt|model|jinja|tiktoken)|[^/]+\.(?:safetensors|safetensors\.index\.json|py|jinja|tiktoken))"
)
"""File names that count as ours in a folder without a list: an unfinished one, or one of an earlier version."""
_BEING_WRITTEN = re.compile(r"(?:.*/)?\.tmp[A-Za-z0-9]{6}")
"""The name under which safetensors writes a file, in an unfinished folder; one that was killed leaves it behind."""


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The folder's manifest; None if it has no valid one."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        return manifest if isinstance(manifest["files"], dict) and "by" in manifest else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def is_own_file(run: Path, path: str, *, without_manifest: bool) -> bool:
    """Whether a file in one of a run's model folders belongs to the model that the run wrote.

    Args:
        path: relative to the run's folder, such as ``model/config.json``.
        without_manifest: the run is of a version that wrote no manifests.
    """
    number = 2 if path.startswith("earlier.") else 1
    parts = path.split("/")
    folder, name = run.joinpath(*parts[:number]), "/".join(parts[number:])
    manifest = read_manifest(folder)
    if _is_without_files(folder):
        return True
    if manifest is None:
        return without_manifest and not (folder / MANIFEST).exists() and bool(_USUAL.fullmatch(name))
    return _is_own(manifest, name)


def _is_own(manifest: dict[str, Any], name: str) -> bool:
    # The list is complete or, while the folder is being written, empty.
    return name in (MANIFEST, MANIFEST + PARTIAL) or name in manifest["files"] or (
        not manifest["files"] and bool(_USUAL.fullmatch(name) or _BEING_WRITTEN.fullmatch(name))
    )  # fmt: skip


def leaves(folder: Path, *, empty_folders: bool = False) -> Iterator[str]:
    """All files and links (and empty folders) below a folder, relative to it; a link to a folder is not followed."""
    for where, folders, files in os.walk(folder):
        for name in sorted([*files, *(name for name in folders if Path(where, name).is_symlink())]):
            yield Path(where, name).relative_to(folder).as_posix()
        if empty_folders and not folders and not files and Path(where) != folder:
            yield Path(where).relative_to(folder).as_posix()


def _is_without_files(folder: Path) -> bool:
    """Whether a process died right after it had created the folder, before the manifest was complete."""
    return folder.name.endswith(PARTIAL) and not folder.is_symlink() and [*leaves(folder)] == [MANIFEST + PARTIAL]


def own_files(folder: Path) -> list[str]:
    """Our files in a model folder, the manifest last; none if the folder is not ours."""
    if _is_without_files(folder):
        return [MANIFEST + PARTIAL]
    manifest = None if folder.is_symlink() else read_manifest(folder)
    found = [] if manifest is None else [name for name in leaves(folder) if _is_own(manifest, name)]
    return sorted(found, key=lambda name: (name.startswith(MANIFEST), name))


def is_ours(folder: Path) -> bool:
    """Whether a command of this package wrote the folder."""
    return not folder.is_symlink() and read_manifest(folder) is not None


def is_in_the_way(folder: Path) -> bool:
    """Whether a file, or a non-empty folder, that is not ours has this name."""
    if folder.is_symlink() or not folder.is_dir():
        return os.path.lexists(folder)
    return any(folder.iterdir()) and not is_ours(folder)


def remove(folder: Path, files: Iterable[str]) -> None:
    """Remove ``files`` (relative to ``folder``), and the folders that this leaves empty."""
    for name in files:
        path = folder / name
        if path.is_dir() and not path.is_symlink():
            prune(path)
        else:
            path.unlink(missing_ok=True)
        _prune_upwards(path.parent, folder)


def move_files(folder: Path, files: Iterable[str], target: Path) -> None:
    """Move ``files`` (relative to ``folder``) to the same paths in ``target``, and remove the folders that this leaves
    empty."""
    for name in files:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).rename(target / name)
        _prune_upwards((folder / name).parent, folder)


def _prune_upwards(path: Path, top: Path) -> None:
    with suppress(OSError):  # not empty
        while path not in (top, top.parent):
            path.rmdir()
            path = path.parent


def prune(folder: Path) -> None:
    """Remove the empty folders below ``folder``, and ``folder`` if it is then empty."""
    if folder.is_symlink() or not folder.is_dir():
        return
    for where, _, _ in os.walk(folder, topdown=False):
        with suppress(OSError):  # not empty
            os.rmdir(where)


def remove_model(folder: Path) -> None:
    """Remove our files from a model folder, and the folder if nothing else is in it."""
    remove(folder, own_files(folder))
    prune(folder)


def begin(folder: Path) -> Path:
    """Create an empty folder, to be filled and passed to :func:`finish`."""
    partial = folder.with_name(folder.name + PARTIAL)
    remove_model(partial)
    number = 1
    while os.path.lexists(partial):  # with somebody's files in it
        partial = folder.with_name(f"{folder.name}.{number}{PARTIAL}")
        remove_model(partial)  # of a process that was killed
        number += 1
    partial.mkdir(parents=True)
    _write_manifest(partial, None, {})
    return partial


def finish(partial: Path, folder: Path, *, keep_earlier: bool) -> Path:
    """Give a complete model folder its final name, and return where it is: beside ``folder`` if that holds files that
    are not ours.

    An earlier model is moved aside, unless a call with ``keep_earlier=False`` wrote it, it is unchanged, and this is
    such a call, too: then it is removed."""
    _set_modes(partial)
    files = {name: _about(partial / name) for name in leaves(partial) if name != MANIFEST}
    _write_manifest(partial, "export" if keep_earlier else "fit", files)
    foreign = set(leaves(folder)) - set(own_files(folder)) if is_ours(folder) else set[str]()
    if is_in_the_way(folder) or foreign & files.keys():
        free = free_name(folder)
        partial.rename(free)
        rank_zero_warn(f"{folder} holds files that are not of this run, and stays as it is: written to {free}")
        return free
    if not is_ours(folder):
        partial.rename(folder)  # replaces an empty folder
        return folder
    aside = None if not keep_earlier and _is_untouched(folder) else free_name(folder)
    if foreign:  # leave those in place
        if aside is None:
            remove(folder, own_files(folder))
        else:
            move_files(folder, own_files(folder), aside)
        move_files(partial, own_files(partial), folder)
        prune(partial)
    else:
        old = aside or folder.with_name(folder.name + OLD)  # a resumed run removes it, should this one die right here
        remove_model(old)
        folder.rename(old)
        partial.rename(folder)
        if aside is None:
            remove_model(old)
    if aside is not None:
        rank_zero_info(f"an earlier model was in {folder}: moved to {aside}")
    return folder


def _about(file: Path) -> dict[str, Any]:
    with file.open("rb") as opened:
        digest = hashlib.file_digest(opened, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
    return {"bytes": file.stat().st_size, "blake2b": digest}


def _is_untouched(folder: Path) -> bool:
    """Whether a run wrote the model and every file is unchanged."""
    manifest = read_manifest(folder)
    if manifest is None or manifest["by"] != "fit":
        return False
    try:
        return all(_about(folder / name) == about for name, about in manifest["files"].items())
    except OSError:
        return False


def adopt(folder: Path) -> None:
    """Give a manifest to a model folder of an earlier version, so that a resumed run moves it aside."""
    if folder.is_dir() and not folder.is_symlink() and not (folder / MANIFEST).exists() and any(folder.iterdir()):
        names = [name for name in leaves(folder) if _USUAL.fullmatch(name)]
        files = {name: _about(folder / name) for name in names if (folder / name).is_file()}
        _write_manifest(folder, "earlier version", files)


def _set_modes(folder: Path) -> None:
    """Give all files the modes of the user's umask: safetensors makes its files readable by their owner alone."""
    # Taken from a file that Python created: reading the umask would change it for a moment, for all threads.
    mode = (folder / MANIFEST).stat().st_mode & 0o666
    for name in leaves(folder):
        path = folder / name
        if not path.is_symlink() and path.stat().st_mode & 0o777 != mode:
            path.chmod(mode)


def _write_manifest(folder: Path, by: str | None, files: dict[str, Any]) -> None:
    write_json(folder / MANIFEST, {"ibro_lightning": __version__, "by": by, "files": files})
