"""How a resumed run's settings differ from before: reported in one block, and refused where the checkpoint's state
would lose its meaning.

A run's ``config.yaml`` holds every resolved setting; the one beside the checkpoint is compared with the present one. A
checkpoint holds weights, optimizers, controlled coefficients and a position in a stream of prompts: with another
dataset, base policy or iteration size that state is meaningless, and the curves fall into two halves. Everything else
(more epochs, a learning rate, evaluation sets, engines, devices, …) is the user's to change.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only

from ibro_lightning.errors import ConfigError
from ibro_lightning.guards.disk import free_name, written_atomically
from ibro_lightning.runs.marks import HEADER

FILE = "config.yaml"
IGNORED = ("ckpt_path", "resume", "run_lock")
"""Sections that concern how a run is resumed, not the run itself."""
FIXED = {
    "model.policy": "the checkpoint's weights were trained from it, with its tokenizer",
    "model.critic": "the checkpoint's critic was trained from it",
    "model.policy_options.lora": "the checkpoint's weights are an adapter of that form",
    "model.policy_options.revision": "the checkpoint's weights were trained from it",
    "data.source": "the checkpoint's place among the prompts is one in those",
    "data.prompt_limits": "they choose prompts, among which the checkpoint has a place",
    "data.on_bad_gold": "it chooses prompts, among which the checkpoint has a place",
    "data.chat_template_kwargs": "they are part of every prompt",
    "data.prompts_per_rollout": "an iteration would be of another size",
    "data.group_size": "an iteration would be of another size",
    "data.rollouts_per_epoch": "the checkpoint counts epochs of that length",
    "data.batch_size": "the checkpoint's place among the demonstrations counts such batches",
    "data.steps_per_epoch": "the checkpoint counts epochs of that length",
}
"""Settings that may not change, nor may any setting below them, and why."""
FIXED_CLASSES = {
    "model": "it is another algorithm",
    "model.regularizer": "the checkpoint has the state of the other one, and the curves would be of two methods",
    "data": "the checkpoint has the state of the other one",
    "data.reward": "curves before and after would not be of the same task",
}
"""Settings whose class may not change, while its arguments may."""
WITH_PARTS = ("model.regularizer", "data.reward")
"""Those for which the same holds for nested objects."""
_OURS = re.compile(r"ibro_lightning(\.\w+)+$")
"""The path of a class of this package, which may differ in another version."""


@dataclass(frozen=True)
class ResumeOptions:
    """How a run resumes from a checkpoint.

    Args:
        allow_changes: resume even with other prompts, or another base policy, iteration size, regularizer or task than
            the checkpoint's run (docs/lightning.md).
    """

    allow_changes: bool = False


class _Absent:
    def __repr__(self) -> str:
        return "(absent)"


ABSENT = _Absent()


@dataclass(frozen=True)
class Change:
    """One setting, then and now."""

    setting: str
    then: Any
    now: Any

    def __str__(self) -> str:
        return f"{self.setting}  {_short(self.then)} -> {_short(self.now)}"

    def why_refused(self) -> str | None:
        """Why a run cannot resume with this change; None if it can."""
        parents = [self.setting[: dot.start()] for dot in re.finditer(r"\.|$", self.setting)]
        reasons = [FIXED[setting] for setting in parents if setting in FIXED]
        if isinstance(self.then, Mapping) or isinstance(self.now, Mapping):  # another object
            classes = [setting for setting in parents if setting == self.setting or setting in WITH_PARTS]
            reasons += [FIXED_CLASSES[setting] for setting in classes if setting in FIXED_CLASSES]
        return next(iter(reasons), None)


@dataclass(frozen=True)
class RunSettings:
    """The content of a ``config.yaml``."""

    values: Mapping[str, Any]
    versions: str = ""
    """The file's first line: the versions of this package and the libraries."""

    @classmethod
    def parse(cls, text: str) -> RunSettings:
        """Parse the file's text. Raises ``ValueError`` if it is not a mapping."""
        values = yaml.load(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
        if not isinstance(values, dict):
            raise ValueError("it is not a mapping")
        first = text.split("\n", 1)[0]
        return cls({key: value for key, value in values.items() if key not in IGNORED}, first)

    @classmethod
    def of_folder(cls, folder: Path) -> RunSettings | str:
        """The settings of the run in ``folder``, or why there are none (as for a run from Python), in a few words."""
        try:
            text = (folder / FILE).read_text()
            return cls.parse(text) if text.startswith(HEADER) else f"its first line does not begin with {HEADER!r}"
        except FileNotFoundError:
            return "no such file"
        except (OSError, ValueError, yaml.YAMLError) as error:
            return f"it cannot be read: {' '.join(str(error).split())[:120]}"

    def version(self) -> str:
        """The version of this package."""
        found = re.match(r"#\s*\S+\s+([^\s,]+)", self.versions)
        return found[1] if found else ""

    def changes(self, now: RunSettings) -> list[Change]:
        """The differences, in the order of the file."""
        return list(_changes(self.values, now.values, ""))


def check_settings(checkpoint: Path, now: RunSettings, options: ResumeOptions) -> None:
    """Report how the settings differ from those of a checkpoint's run. Raises :class:`ConfigError` for a change that
    makes the checkpoint's state meaningless, unless ``options`` allow it."""
    folder = checkpoint.resolve().parent.parent
    then = RunSettings.of_folder(folder)
    if isinstance(then, str):
        rank_zero_info(
            f"{folder / FILE}: {then}: the settings cannot be compared with those that {checkpoint.name} was trained "
            "with, so no change is reported or refused"
        )
        return
    cwd = _working_directory(folder, then)
    if not (changes := [change for change in then.changes(now) if not _is_same(change.then, change.now, cwd)]):
        return
    lines = "\n".join(f"  {change}" for change in changes)
    rank_zero_info(f"settings that differ from {folder / FILE}:\n{lines}")
    same_version = then.version() == now.version()
    refused = [
        (change, reason)
        for change in changes
        # A setting that exists in only one of two versions has not changed its value.
        if (reason := change.why_refused()) and (same_version or ABSENT not in (change.then, change.now))
    ]
    if refused and not options.allow_changes:
        first, reason = refused[0]
        others = "; the same goes for " + ", ".join(change.setting for change, _ in refused[1:]) if refused[1:] else ""
        raise ConfigError(
            first.setting,
            _short(first.now) if isinstance(first.now, Mapping) else first.now,
            f"{checkpoint} is of a run with {_short(first.then)}, and {reason}{others}: write what it was, start a new "
            "run, or write --resume.allow_changes true to resume anyway",
        )


@rank_zero_only
def keep_settings(folder: Path, now: RunSettings) -> Path | None:
    """Before ``config.yaml`` is overwritten, keep it as ``config.1.yaml``, ``config.2.yaml``, … if the settings differ.
    Returns the copy's path, or None."""
    path = folder / FILE
    if not path.exists():
        return None
    then = RunSettings.of_folder(folder)
    if not isinstance(then, str) and then.versions == now.versions and not then.changes(now):
        return None
    content, number = path.read_bytes(), 1
    while os.path.lexists(kept := folder / f"config.{number}.yaml"):
        if kept.is_file() and kept.read_bytes() == content:
            return kept
        number += 1
    with written_atomically(kept) as partial:
        partial.write_bytes(content)
    rank_zero_info(f"the earlier settings are kept in {kept}")
    return kept


def set_settings_aside(path: Path, new: Path) -> None:
    """The same for ``validate.yaml`` and the like, which are moved, as no killed run depends on them. Settings that
    :func:`keep_settings` ignores, such as the checkpoint, count here: they tell what was evaluated."""
    if os.path.lexists(path) and _lines(path) != _lines(new):
        number = free_name(path.with_suffix(""), path.suffix).suffix
        path.rename(path.with_suffix(number + path.suffix))


def _lines(path: Path) -> list[str] | None:
    if not path.is_file():  # a link that leads nowhere
        return None
    return [line for line in path.read_text().splitlines() if not line.startswith("#")]


@rank_zero_only
def put_settings_back(folder: Path, kept: Path | None) -> None:
    """Undo :func:`keep_settings` if nothing was computed with the new settings."""
    if kept is not None and kept.exists():
        os.replace(kept, folder / FILE)


def _changes(then: Any, now: Any, name: str) -> Iterator[Change]:
    if then == now and type(then) is type(now):
        return
    both = isinstance(then, Mapping) and isinstance(now, Mapping)
    if not both or not _is_same(then.get("class_path"), now.get("class_path"), cwd=""):
        if _plain(then) != _plain(now):
            yield Change(name, then, now)
        return
    for key in dict.fromkeys([*then, *now]):
        below = name if key in ("init_args", "dict_kwargs") else f"{name}.{key}".removeprefix(".")
        yield from _changes(then.get(key, ABSENT), now.get(key, ABSENT), below)


def _plain(value: Any) -> Any:
    """``value``, with an empty mapping or list as None: these are the same setting."""
    return None if value in ({}, []) else value


def _is_same(then: Any, now: Any, cwd: str) -> bool:
    """Whether two settings are the same, including two spellings of a path (earlier ones are relative to ``cwd``), and
    a class of ours that has moved."""
    if isinstance(then, str) and isinstance(now, str):
        path = os.path.realpath(os.path.expanduser(now))
        same = os.path.realpath(os.path.join(cwd, os.path.expanduser(then))) == path
        moved = _OURS.match(then) and _OURS.match(now) and then.rpartition(".")[2] == now.rpartition(".")[2]
        return bool(then == now or moved or (same and os.path.exists(path)))
    if isinstance(then, list) and isinstance(now, list):
        return len(then) == len(now) and all(_is_same(*pair, cwd) for pair in zip(then, now, strict=True))
    if isinstance(then, Mapping) and isinstance(now, Mapping):
        return then.keys() == now.keys() and all(_is_same(then[key], now[key], cwd) for key in then)
    return bool(then == now) and type(then) is type(now)


def _working_directory(folder: Path, then: RunSettings) -> str:
    """Where the earlier command was started, if the run's folder ends with its relative ``default_root_dir``; otherwise
    the present working directory."""
    trainer = then.values.get("trainer")
    root = trainer.get("default_root_dir") if isinstance(trainer, Mapping) else None
    parts = Path(root).parts if isinstance(root, str) and not root.startswith(("/", "~", "..")) else ()
    matches = parts and folder.parts[-len(parts) :] == parts
    return str(Path(*folder.parts[: -len(parts)])) if matches else os.getcwd()


def _short(value: Any, limit: int = 60) -> str:
    """``ClassName(argument=value, …)`` for an object."""
    if isinstance(value, Mapping) and "class_path" in value:
        arguments = ", ".join(f"{k}={_short(v, 20)}" for k, v in (value.get("init_args") or {}).items())
        text = f"{str(value['class_path']).rpartition('.')[2]}({arguments})"
    elif isinstance(value, Sequence) and not isinstance(value, str):
        text = f"[{', '.join(_short(item, 20) for item in value)}]"
    else:
        text = "null" if value is None else str(value)
    return text if len(text) <= limit else text[: limit - 1] + "…"
