"""What callbacks require of a module or a batch, and the warning if it is missing; and what they may be asked for."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, TypeGuard, runtime_checkable

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_warn

from ibro_lightning.batches import Rollout, Sequences
from ibro_lightning.batches.experience import Experience
from ibro_lightning.evaluation.metrics import Evaluation


@runtime_checkable
class EvaluatedModule(Protocol):
    """A module that keeps the latest evaluation of each set, as :class:`.SampleAccuracy` computes it."""

    evaluations: dict[str, Evaluation]

    @property
    def iteration(self) -> int: ...
    @property
    def evaluation_is_current(self) -> bool: ...


@runtime_checkable
class ExportedModule(Protocol):
    """A module that exports itself as a Hugging Face folder."""

    @property
    def source_folders(self) -> tuple[Path, ...]: ...
    def export(self, folder: Path | str, *, keep_earlier: bool = True) -> Path: ...
    def export_names(self, folder: Path) -> tuple[Path, ...]: ...


@runtime_checkable
class RolloutModule(Protocol):
    """A module that learns from rollouts, and shows each to the callbacks before its update (:func:`watched`)."""

    scorer: Any
    updater: Any
    policy_loss: Any


@runtime_checkable
class ExperienceWatcher(Protocol):
    """A callback that looks at a rollout after its advantages are computed and before its update."""

    def on_experience(
        self, trainer: pl.Trainer, pl_module: Any, rollout: Rollout, experience: Experience
    ) -> Mapping[str, float]:
        """Further curves of the iteration. Called on all ranks; must leave the module and its random numbers alone."""


@runtime_checkable
class MetricsWatcher(Protocol):
    """A callback that draws conclusions from an iteration's metrics, before they are logged."""

    def on_metrics(self, iteration: int, metrics: Mapping[str, float]) -> Mapping[str, float]:
        """Further curves of the iteration. Called once, on all ranks, with equal metrics."""


def watched(module: Any, rollout: Rollout, experience: Experience) -> dict[str, float]:
    """The curves of all callbacks of a module's Trainer that look at its rollouts; none without a Trainer."""
    callbacks = [] if module._trainer is None else module.trainer.callbacks
    curves: dict[str, float] = {}
    for callback in callbacks:
        if isinstance(callback, ExperienceWatcher):
            curves |= callback.on_experience(module.trainer, module, rollout, experience)
    return curves


def warn_unless(callback: pl.Callback, module: pl.LightningModule, needed: type[Any], members: str) -> None:
    """Warn in one line if ``module`` does not implement ``needed``, one of the protocols above."""
    if not isinstance(module, needed):
        rank_zero_warn(f"{_name(callback)} does nothing: it needs a module with {members}, which {_name(module)} lacks")


def is_rollout(batch: Any, callback: pl.Callback, warned: set[type]) -> TypeGuard[Rollout]:
    """Whether a batch is a rollout; warns once per type, recorded in ``warned``, if it is neither a rollout nor
    demonstrations."""
    if not isinstance(batch, Rollout | Sequences) and type(batch) not in warned:
        warned.add(type(batch))
        rank_zero_warn(f"{_name(callback)} does nothing: it needs batches of type Rollout, and got {_name(batch)}")
    return isinstance(batch, Rollout)


def _name(value: object) -> str:
    return type(value).__name__
