"""What callbacks require of a module or a batch, and the warning if it is missing."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol, TypeGuard, runtime_checkable

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_warn

from ibro_lightning.batches import Rollout, Sequences
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
