"""Optimizer steps that are skipped because a number is not finite: their causes, their count, and when to stop."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ibro_lightning.batches.experience import Experience
from ibro_lightning.errors import UserError, check_count
from ibro_lightning.guards.disk import free_name, written_atomically
from ibro_lightning.ranks import Ranks, rank_zero_warn


class NonFiniteError(UserError, RuntimeError):
    """Too many steps in a row were NaN or infinite; the message names the cause and the saved batch."""


class NonFiniteGuard:
    """Counts, per network, the steps skipped in a row; the count is part of the checkpoint.

    All ranks must report the same: a global norm, a loss summed over ranks, :func:`advantages_are_finite`.

    Args:
        limit: training stops after this many in a row; 0 never stops.
    """

    def __init__(self, limit: int = 5) -> None:
        check_count("max_nonfinite_steps", limit, 0)
        self.limit = limit
        self.in_a_row: dict[str, int] = {}
        self.causes: list[str] = []
        """Why steps of this iteration were skipped."""
        self.steps = 0
        """Optimizer steps of this iteration, including skipped ones."""
        self._offender: tuple[str, str, Any] | None = None

    def state_dict(self) -> dict[str, int]:
        return dict(self.in_a_row)

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        self.in_a_row = dict(state)

    def start_iteration(self) -> None:
        self.steps, self.causes, self._offender = 0, [], None

    def record(self, network: str, cause: str | None, batch: Any = None) -> None:
        """Record an optimizer step of a network as taken (``cause`` is None) or skipped.

        Args:
            cause: what was not finite: "advantage", "loss" or "gradient".
            batch: the step, or other tensors that it was computed from.
        """
        self.steps += 1
        if cause is None:
            self.in_a_row[network] = 0
            return
        self.causes.append(f"{network} {cause}")
        self.in_a_row[network] = self.in_a_row.get(network, 0) + 1
        if self.limit and self.in_a_row[network] >= self.limit and self._offender is None:
            self._offender = (network, cause, batch)

    def report(self, iteration: int) -> None:
        """Warn of the skipped steps of this iteration."""
        if self.causes:
            counted = ", ".join(f"the {cause} ({self.causes.count(cause)})" for cause in dict.fromkeys(self.causes))
            left_out = f"{len(self.causes)} of {self.steps} optimizer steps left out"
            rank_zero_warn(f"iteration {iteration}: {left_out}: not finite is {counted}")

    def check(
        self, folder: Path, iteration: int, rank: int = 0, save_rollout: Callable[[Path], object] | None = None
    ) -> None:
        """Save this rank's batch and raise, if the limit is reached. Every rank calls this at the iteration's end.

        Args:
            folder: of the run; the batch goes to ``nonfinite/`` in it.
            save_rollout: writes the rollout's texts to the parquet file that it is given.

        Raises:
            NonFiniteError: the limit is reached.
            DiskFullError: there is no room for the batch.
        """
        if self._offender is None:
            return
        network, cause, batch = self._offender
        name = folder / "nonfinite" / f"iteration_{iteration:06d}_rank_{rank}"
        if name.with_name(f"{name.name}.pt").exists():
            name = free_name(name, ".pt", ".parquet")
        path = name.with_name(f"{name.name}.pt")
        tensors = dict(_tensors("", batch))  # under dotted names, for torch.load(path)
        with written_atomically(path) as partial:
            torch.save({"network": network, "cause": cause, "iteration": iteration, **tensors}, partial)
        if save_rollout is not None:
            save_rollout(path.with_suffix(".parquet"))
        raise NonFiniteError(
            f"iteration {iteration}: {self.in_a_row[network]} optimizer steps of the {network} in a row were left out, "
            f"as the {cause} is not finite (max_nonfinite_steps: {self.limit}); its batch is in {path}: look in "
            "it for what is infinite, or resume from a checkpoint with a lower learning rate"
        )


def nonfinite_cause(norm: Tensor, losses: Mapping[str, float]) -> str | None:
    """What is not finite in a step, "loss" or "gradient", or None; all ranks must agree on losses and norm."""
    if not all(math.isfinite(value) for value in losses.values()):
        return "loss"
    return None if bool(norm.isfinite()) else "gradient"


def advantages_are_finite(step: Experience, ranks: Ranks) -> bool:
    """Whether the advantages that take part in the loss are finite, on all ranks."""
    bad = (~step.advantages.isfinite() & step.mask).any()
    return not bool(ranks.max(bad.to(torch.float32)))


def _tensors(name: str, value: Any) -> Iterator[tuple[str, Tensor]]:
    """All tensors of nested dataclasses and mappings."""
    if isinstance(value, Tensor):
        yield name.removeprefix("."), value.detach().cpu()
    elif is_dataclass(value):
        for field in fields(value):
            yield from _tensors(f"{name}.{field.name}", getattr(value, field.name))
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _tensors(f"{name}.{key}", item)
