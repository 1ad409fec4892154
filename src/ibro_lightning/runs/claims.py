"""Which files in a run's folder are the run's, and which would be in a command's way: checked before it starts."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from ibro_lightning.errors import ConfigError
from ibro_lightning.guards.disk import PARTIAL
from ibro_lightning.runs.authorship import is_evaluation_manifest
from ibro_lightning.runs.marks import Mark, has_other_mark, read_mark, write_mark
from ibro_lightning.runs.model_folders import OLD, adopt, leaves
from ibro_lightning.runs.run_files import CATALOG, MARK, MODELS, entry_of

_NUMBERED = re.compile(r"\.\d+(?:\.partial)?$")
_WEIGHTS = ("config.json", "adapter_config.json", "model.safetensors", "model.safetensors.index.json",
            "pytorch_model.bin", "tokenizer.json", "tokenizer_config.json")  # fmt: skip
"""Files of which any one makes a folder a model."""


@dataclass(frozen=True)
class Survey:
    """The files, links and empty folders below a run's folder, relative to it."""

    own: tuple[str, ...]
    foreign: tuple[str, ...]


def survey(folder: Path, mark: Mark | None = None) -> Survey:
    """Tell the run's files from others, judging by ``mark`` or, if that is None, by the folder's. Links are not
    followed."""
    mark = mark or read_mark(folder)
    own: list[str] = []
    foreign: list[str] = []
    for path in leaves(folder, empty_folders=True):
        (own if mark is not None and _owns(mark, folder, path) else foreign).append(path)
    return Survey(tuple(own), tuple(foreign))


def _owns(mark: Mark, folder: Path, path: str) -> bool:
    if not os.path.isdir(folder / path):  # False, not an error, for a link that leads into a closed folder
        return mark.owns(folder, path)
    if not (folder / path).is_symlink():
        return mark.owns_folder(path)
    # A link may take the place of one of the run's folders, which the user keeps elsewhere; one to a model is not ours.
    return mark.owns(folder, path) or (mark.owns_folder(path) and path not in MODELS)


def claim(folder: Path, parts: Collection[str], *, files: Collection[str] = (), writes: bool = True) -> None:
    """Claim names in a run's folder before anything is written there.

    Args:
        parts: see :data:`.run_files.PARTS`.
        files: further files, which must not exist yet.
        writes: record the claim in the folder: True on one rank, while all of them must call this.

    Raises:
        ConfigError: one of the names is taken by something that is not the run's.
    """
    if found := in_the_way(folder, parts):
        raise refusal(folder, found)
    if not writes:
        return
    mark = read_mark(folder)
    if mark is not None and mark.processes is None:
        for model in set(MODELS) & set(parts):
            adopt(folder / model)
    write_mark(folder, parts, files)


def refusal(folder: Path, found: Sequence[str]) -> ConfigError:
    """The error for what :func:`in_the_way` found."""
    more = f" and {len(found) - 3} more" if len(found) > 3 else ""
    return ConfigError(
        "trainer.default_root_dir",
        str(folder),
        f"it holds {', '.join(found[:3])}{more}, which no run of this folder has written, under names that this "
        "command writes: move that elsewhere, or write another folder for the run, such as runs/mine",
    )


def in_the_way(folder: Path, parts: Collection[str]) -> list[str]:
    """Paths, relative to the folder, that are not the run's and have names that the parts need."""
    mark = read_mark(folder)
    claimed = mark.parts if mark is not None else frozenset[str]()
    found = [MARK] if has_other_mark(folder) else []
    for part in sorted(set(parts) - claimed):
        names = (part, part + PARTIAL, *((part + OLD,) if part in MODELS else ()))
        blocked = [name for name in names if _is_taken(folder / name)]
        if blocked and not (part == "evaluations" and _are_all_ours(folder / part)):
            found += [name + "/" * (folder / name).is_dir() for name in blocked]
    found += _with_numbers(folder, set(parts) - claimed)
    if mark is not None and (own_parts := claimed & set(parts)):
        files = survey(folder, mark)
        ours = {path.split("/")[0] for path in files.own}
        found += [path for path in files.foreign if _blocks(folder, path, own_parts, ours)]
    return found


def _with_numbers(folder: Path, parts: Collection[str]) -> list[str]:
    """Paths with names that only later runs use (``config.1.yaml``, ``predictions.1/``, ``earlier.1/``), and that would
    count as ours from now on. Models are excluded, as their manifests tell whose they are."""
    found = []
    for path in sorted(folder.iterdir()) if folder.is_dir() and parts else ():
        is_folder = path.is_dir() and not path.is_symlink()
        inside = [f"{path.name}/{leaf}" for leaf in leaves(path)] if is_folder and _NUMBERED.search(path.name) else []
        entries = (entry_of(name) for name in (inside if is_folder else [path.name]))
        if path.name not in parts and any(e and e.part in parts and e.part not in MODELS for e in entries):
            found.append(path.name + "/" * is_folder)
    return found


def _is_taken(path: Path) -> bool:
    return any(path.iterdir()) if path.is_dir() else os.path.lexists(path)


def _are_all_ours(evaluations: Path) -> bool:
    """Whether a folder that was copied here without its run holds only evaluations, judging by their manifests."""
    names = {path.parent.name for path in evaluations.glob("*/_manifest.json") if is_evaluation_manifest(path)}
    found = list(leaves(evaluations)) if not evaluations.is_symlink() else []
    ours = (entry_of(f"evaluations/{path}") and path.split("/")[0].removesuffix(".json") in names for path in found)
    return bool(found) and all(ours)


def _blocks(folder: Path, path: str, parts: Collection[str], ours: Collection[str]) -> bool:
    """Whether a foreign file in a run's folder has the place of one of the run's, whose paths start with ``ours``."""
    if path.startswith("earlier."):
        return False
    names = path.split("/")
    if names[0] in MODELS:
        # Other files do no harm beside ours, nor where ours were moved away.
        is_model = any((folder / names[0] / name).exists() for name in _WEIGHTS)
        return names[0] in parts and (len(names) == 1 or (is_model and names[0] not in ours))
    if names[0] == "checkpoints" and len(names) > 2 and names[1].startswith("iteration_"):
        return False  # allowed among shards; what is in a checkpoint's way is set aside
    # A file in the place of a folder, or a folder in the place of a file.
    is_folder = (folder / path).is_dir() and not (folder / path).is_symlink()
    starts = ["/".join(names[:depth]) for depth in range(1, len(names) + 1)]
    return any(
        (entry.fixed_folders.fullmatch(path) and not is_folder)
        or any(entry.pattern.fullmatch(start) for start in starts)
        for entry in CATALOG
        if entry.part in parts and entry.part not in MODELS
    )
