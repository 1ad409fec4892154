"""The plan of a study as the report reads it: from the study file in a results folder, today's or an older one's."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from ibro_lightning.errors import ConfigError
from ibro_lightning.studies.study_file import Arm, spread


@dataclass(frozen=True)
class ReportedPlan:
    """What was settled before the results; empty for runs without a study.

    This reads more leniently than the runner's own classes, as reports are made again long after their study."""

    metric: str = ""
    """The primary outcome, read at the last evaluation."""
    comparisons: tuple[tuple[str, str], ...] = ()
    """``(reference, other)``, arms by name."""
    test: str = "sign_flip"
    level: float = 0.05
    difference_that_matters: float | None = None
    """In the metric's unit."""
    paired_sd: float | None = None
    """Standard deviation of paired differences in a pilot."""
    content: Mapping[str, Any] = field(default_factory=dict)
    """All of it as written."""

    @property
    def text(self) -> str:
        """As the report prints it: YAML, in the order of the file."""
        return (
            yaml.safe_dump(dict(self.content), sort_keys=False, allow_unicode=True, width=100) if self.content else ""
        )

    @property
    def digest(self) -> str:
        """sha256 of :attr:`text` in UTF-8."""
        return hashlib.sha256(self.text.encode()).hexdigest()


@dataclass(frozen=True)
class ReportedStudy:
    """A study file: the plan, and what was run for it."""

    name: str
    plan: ReportedPlan
    labels: Mapping[str, str]
    """``{arm: how to call it}``, in the order of the file."""
    seeds: tuple[int, ...]
    content: Mapping[str, Any]
    """All of it as written."""

    def label(self, arm: str) -> str:
        return self.labels.get(arm, arm)


def read_reported(path: Path) -> ReportedStudy:
    """Read a study file; raises :class:`ConfigError` where it is missing, or is not one."""
    try:
        content = yaml.safe_load(path.read_text())
    except FileNotFoundError as error:
        remedy = "no study file is there: name a folder that `study` has written, or the folders of several runs"
        raise ConfigError("report", str(path), remedy) from error
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError("report", str(path), f"this study file cannot be read: {error}") from error
    return study_of(content, str(path))


def study_of(content: Any, where: str) -> ReportedStudy:
    """The study that a file's content describes; ``where`` it is, for errors."""
    try:
        arms = _arms(dict(content["arms"]))
        plan = _plan(dict(content["plan"]))
        if unknown := sorted({arm for pair in plan.comparisons for arm in pair} - {*arms}):
            raise ValueError(f"its comparisons name {', '.join(unknown)}, which is no arm of it")
        if plan.test != "sign_flip":
            raise ValueError(f"its test is {plan.test}, and the report has sign_flip alone")
        return ReportedStudy(
            name=str(content["name"]),
            plan=plan,
            labels={name: arm.label or name for name, arm in arms.items()},
            seeds=tuple(int(seed) for seed in content["seeds"]),
            content=dict(content),
        )
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        reason = f"{error} is missing" if isinstance(error, LookupError) else str(error)
        raise ConfigError("report", where, f"this is no study file: {reason}") from error


def _arms(content: dict[str, Any]) -> dict[str, Arm]:
    """Arms as they were run, grids spread out."""
    known = Arm.__dataclass_fields__
    given = {
        str(name): {key: value for key, value in (arm or {}).items() if key in known} for name, arm in content.items()
    }
    return dict(point for name, arm in given.items() for point in spread(name, Arm(**arm)))


def _plan(content: dict[str, Any]) -> ReportedPlan:
    def number(key: str) -> float | None:
        return None if content.get(key) is None else float(content[key])

    return ReportedPlan(
        metric=str(content["metric"]),
        comparisons=tuple((str(first), str(second)) for first, second in content["comparisons"]),
        test=str(content.get("test", "sign_flip")),
        level=float(content.get("level", 0.05)),
        difference_that_matters=number("difference_that_matters"),
        paired_sd=number("paired_sd"),
        content=content,
    )
