"""When a plan was written, and whether it is older than the results: from the repository that holds both."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml

from ibro_lightning.studies.plan import ReportedStudy
from ibro_lightning.studies.results import RESULTS, STUDY, VERSIONS

WARNING = "WARNING: "
"""Begins sentences that a reader must not miss."""
PARTS = ("plan", "arms", "seeds", "recipe", "settings", "base_policy", "temperatures")
"""Parts of a study file that decide what its results mean."""


@dataclass(frozen=True)
class Commit:
    """A commit that touched a file, which had ``path`` then."""

    name: str
    date: str
    """Of the commit, ISO 8601."""
    path: str

    def __str__(self) -> str:
        return f"{self.name[:10]} of {self.date[:10]}"


@dataclass(frozen=True)
class History:
    """What the repository tells of a study file."""

    path: str = ""
    """Of the study file, relative to the repository; empty where none is committed."""
    introduced: Commit | None = None
    results: Commit | None = None
    """The commit that introduced the results."""
    changed_after: tuple[tuple[Commit, tuple[str, ...]], ...] = ()
    """Later commits that changed the study file, with the parts that they changed."""
    differs: tuple[str, ...] = ()
    """Parts in which the results' own study file differs from the one last committed."""

    def sentences(self) -> list[str]:
        """What a reader has to know, in plain words."""
        if self.introduced is None:
            return [WARNING + "the study file is not committed: nothing shows that the plan is older than the results."]
        sentences = [f"The study file {self.path} was introduced by commit {self.introduced}."]
        if self.results is None:
            sentences.append("The results are not committed yet.")
        else:
            sentences.append(f"The first results were committed by {self.results}.")
            if self.results.name == self.introduced.name:
                sentences.append(WARNING + "plan and results came with one commit: nothing shows which is older.")
        for commit, parts in self.changed_after:
            sentences.append(WARNING + f"after that, commit {commit} changed {_list(parts)} of the study file.")
        if self.results is not None and not self.changed_after:
            sentences.append("The study file has not been changed since.")
        if self.differs:
            sentences.append(
                WARNING + f"the results are of a study file with another {_list(self.differs)} than committed."
            )
        return sentences


def history_of(folder: Path, study: ReportedStudy) -> History:
    """The history of the study behind a results folder.

    The study file is the committed one of that name in a folder ``studies`` (``configs/studies/NAME.yaml``), or else
    the copy in the results folder.
    """
    root = _git(folder, "rev-parse", "--show-toplevel")
    if not root:
        return History()
    repository = Path(root.strip())
    path = _named_file(repository, folder) or _study_file(repository, folder, study.name)
    commits = _commits(repository, path) if path else []
    if path is None or not commits:
        return History()
    introduced = commits[-1]
    results = _commits(repository, _inside(repository, folder / RESULTS))
    first = results[-1] if results else None
    changed = []
    for newer, older in pairwise(commits):
        after = first is not None and newer.name != first.name and _is_ancestor(repository, first.name, newer.name)
        if after and (parts := _changed(_content(repository, older), _content(repository, newer))):
            changed.append((newer, parts))
    differs = _changed(_content(repository, commits[0]), study.content, lenient=True)
    return History(path, introduced, first, tuple(reversed(changed)), differs)


def _named_file(repository: Path, folder: Path) -> str | None:
    """The study file that `study` was given, if it is committed there."""
    try:
        named = json.loads((folder / VERSIONS).read_text()).get("study_file", "")
    except (OSError, ValueError):
        return None
    return named if named and _git(repository, "ls-files", "--error-unmatch", named) is not None else None


def _study_file(repository: Path, folder: Path, name: str) -> str | None:
    listed = (_git(repository, "ls-files", f"studies/{name}.yaml", f"*/studies/{name}.yaml") or "").split("\n")
    own = _inside(repository, folder / STUDY)
    shipped = [path for path in listed if path and path != own]
    return next(iter([*shipped, own]))


def _inside(repository: Path, path: Path) -> str:
    return path.resolve().relative_to(repository.resolve()).as_posix()


def _commits(repository: Path, path: str) -> list[Commit]:
    """Those that touched a file, the newest first, across renames."""
    text = _git(repository, "log", "--follow", "--format=%x00%H %cI", "--name-only", "--", path) or ""
    commits = []
    for entry in text.split("\0")[1:]:
        head, *names = [line for line in entry.split("\n") if line]
        name, date = head.split(" ")
        commits.append(Commit(name, date, names[-1] if names else path))
    return commits


def _content(repository: Path, commit: Commit) -> Mapping[str, Any]:
    try:
        content = yaml.safe_load(_git(repository, "show", f"{commit.name}:{commit.path}") or "")
    except yaml.YAMLError:
        return {}
    return content if isinstance(content, Mapping) else {}


def _changed(before: Mapping[str, Any], after: Mapping[str, Any], *, lenient: bool = False) -> tuple[str, ...]:
    """Parts that differ; ``lenient``: what only ``after`` has is a default that was filled in."""
    return tuple(part for part in PARTS if not _same(before.get(part), after.get(part), lenient))


def _same(before: Any, after: Any, lenient: bool) -> bool:
    if isinstance(before, Mapping) and isinstance(after, Mapping):
        names = before if lenient else {*before, *after}
        return all(_same(before.get(name), after.get(name), lenient) for name in names)
    if isinstance(before, list | tuple) and isinstance(after, list | tuple):
        return len(before) == len(after) and all(_same(a, b, lenient) for a, b in zip(before, after, strict=True))
    return bool(before == after) or (lenient and before is None)


def _is_ancestor(repository: Path, older: str, newer: str) -> bool:
    return _git(repository, "merge-base", "--is-ancestor", older, newer) is not None


def _git(folder: Path, *arguments: str) -> str | None:
    """What git prints; None where there is no git, no repository, or nothing of that name."""
    try:
        done = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None


def _list(names: tuple[str, ...]) -> str:
    return " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))
