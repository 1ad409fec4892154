"""Optimizer steps that are left out because a number is not finite: told apart, counted, and stopped if they go on."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ibro_lightning.errors import check_at_least
from ibro_lightning.experience import Experience
from ibro_lightning.guards.disk import written_whole
from ibro_lightning.ranks import Ranks
from ibro_lightning.records import write_parquet
from ibro_lightning.types import Rollout


class NonFiniteError(RuntimeError):
    """Step after step came out as NaN or infinity. Says of what, and where the batch is."""


class NonFiniteGuard:
    """Counts, per network, the steps in a row that were left out; the count is part of the checkpoint.

    All ranks see the same: what it is told must be agreed (a global norm, a loss added up over the ranks,
    :func:`advantages_are_finite`).

    Args:
        limit: training stops after so many in a row; 0 never stops.
    """

    def __init__(self, limit: int = 5) -> None:
        check_at_least("model.max_nonfinite_steps", limit, 0)
        self.limit = limit
        self.in_a_row: dict[str, int] = {}
        self.causes: list[str] = []
        """Why steps of this iteration were left out."""
        self.steps = 0
        """Optimizer steps of this iteration, those that were left out included."""
        self._offender: tuple[str, str, Any] | None = None

    def state_dict(self) -> dict[str, int]:
        return dict(self.in_a_row)

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        self.in_a_row = dict(state)

    def begin(self) -> None:
        """A new iteration."""
        self.steps, self.causes, self._offender = 0, [], None

    def saw(self, network: str, cause: str | None, batch: Any = None) -> None:
        """An optimizer step of a network was taken (``cause`` is None), or left out.

        Args:
            cause: what was not finite: "advantage", "loss" or "gradient".
            batch: the step, or whatever else of tensors it was computed from.
        """
        self.steps += 1
        if cause is None:
            self.in_a_row[network] = 0
            return
        self.causes.append(f"{network} {cause}")
        self.in_a_row[network] = self.in_a_row.get(network, 0) + 1
        if self.limit and self.in_a_row[network] >= self.limit and self._offender is None:
            self._offender = (network, cause, batch)

    def check(self, folder: Path, iteration: int, rank: int = 0, rollout: Rollout | None = None) -> None:
        """Save this rank's batch and stop, if it was one too many. Every rank calls this at the iteration's end.

        Args:
            folder: of the run; the batch goes to ``nonfinite/`` in it.

        Raises:
            NonFiniteError: so many steps in a row were left out.
        """
        if self._offender is None:
            return
        network, cause, batch = self._offender
        path = folder / "nonfinite" / f"iteration_{iteration:06d}_rank_{rank}.pt"
        save_tensors(path, {"network": network, "cause": cause, "iteration": iteration}, batch)
        if rollout is not None:
            write_parquet(path.with_suffix(".parquet"), rollout, tokens=True)
        raise NonFiniteError(
            f"iteration {iteration}: {self.in_a_row[network]} optimizer steps of the {network} in a row were left out, "
            f"as the {cause} is not finite (model.max_nonfinite_steps: {self.limit}); its batch is in {path}: look in "
            "it for what is infinite, or go on from a checkpoint with a lower learning rate"
        )


def nonfinite_cause(norm: Tensor, losses: Mapping[str, float]) -> str | None:
    """What of a step is not finite, or None; of its losses and the norm of its gradient, which all ranks agree on."""
    if not all(math.isfinite(value) for value in losses.values()):
        return "loss"
    return None if bool(norm.isfinite()) else "gradient"


def advantages_are_finite(step: Experience, ranks: Ranks) -> bool:
    """Those that take part in the loss, on all ranks; before anything is computed from them."""
    bad = (~step.advantages.isfinite() & step.mask).any()
    return not bool(ranks.max(bad.to(torch.float32)))


def save_tensors(path: Path, about: Mapping[str, Any], batch: Any) -> Path:
    """All tensors of nested dataclasses and mappings under dotted names, for ``torch.load(path)``.

    Raises:
        DiskFullError: there is no room for it.
    """
    with written_whole(path) as partial:
        torch.save({**about, **dict(_tensors("", batch))}, partial)
    return path


def _tensors(name: str, value: Any) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        yield name.removeprefix("."), value.detach().cpu()
    elif is_dataclass(value):
        for field in fields(value):
            yield from _tensors(f"{name}.{field.name}", getattr(value, field.name))
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _tensors(f"{name}.{key}", item)
