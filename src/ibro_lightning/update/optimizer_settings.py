"""Compares the configured settings of an optimizer with a checkpoint's: whether they are the same, and whether the
checkpoint's state works with the new ones."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ibro_lightning.errors import ConfigError
from ibro_lightning.update.optimizer import plain, qualified_name, short

CONFIGURED = "configured"
"""The key of an optimizer's state under which it keeps its class and settings."""
HOW = ("foreach", "fused", "capturable")
"""Settings of how a step is computed, not of its result: their changes are not reported."""


def check_resumable(
    optimizer: Optimizer, state: Mapping[str, Any], setting: str, groups: Sequence[Mapping[str, Any]] | None = None
) -> list[dict[str, Any]]:
    """The new settings of each parameter group, provided that the optimizer can resume from ``state`` with them.

    Args:
        state: of an optimizer, from a checkpoint.
        groups: the configured settings; None takes the optimizer's present ones.

    Raises:
        ConfigError: ``state`` is of another class of optimizer, or of other groups, or lacks what a new setting needs.
    """
    is_trial = groups is None  # on the CPU, where steps may be computed in another way
    groups = [settings_of(group) for group in optimizer.param_groups] if groups is None else groups
    kind, saved = qualified_name(type(optimizer)), configured_in(state)
    names = [set(settings) - {"initial_lr"} for settings in (groups[0], saved["groups"][0])]
    if saved["class"] not in (None, kind) or (saved["class"] is None and names[0] - names[1] and names[1] - names[0]):
        other = saved["class"] or f"an optimizer with {', '.join(sorted(names[1] - names[0]))}"
        raise ConfigError(
            setting,
            kind,
            f"the checkpoint has the state of {other}, from which {kind} cannot resume: write that again, or start a "
            "new run from the folder that `export` makes of the checkpoint",
        )
    if len(groups) != len(saved["groups"]):
        raise ConfigError(
            setting,
            kind,
            f"it has {len(groups)} parameter groups, the checkpoint {len(saved['groups'])}: group them as they were",
        )
    changed = [
        {
            name: value
            for name, value in new.items()
            if not same(value, old.get(name, value)) and not (is_trial and name in HOW)
        }
        for new, old in zip(groups, saved["groups"], strict=True)
    ]
    if any(changed):
        _check_state_serves(optimizer, state, setting, changed, saved["groups"])
    return changed


def configured_in(state: Mapping[str, Any]) -> dict[str, Any]:
    """The configured class (None if unknown) and groups of a saved optimizer; older checkpoints do not record them."""
    if CONFIGURED in state:
        configured: dict[str, Any] = state[CONFIGURED]
        return configured
    return {"class": None, "groups": [settings_of(group) for group in state["param_groups"]]}


def settings_of(group: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of the settings of a param group that checkpoints can hold; schedules change tensors in place."""
    kept = {name: copy.deepcopy(value) for name, value in group.items() if name != "params" and _is_plain(value)}
    # With a schedule, lr is only its present value.
    return {**kept, "lr": kept["initial_lr"]} if "initial_lr" in kept else kept


def _is_plain(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    if isinstance(value, Tensor):
        return value.numel() == 1
    return value is None or isinstance(value, bool | int | float | str)


def _check_state_serves(
    optimizer: Optimizer,
    state: Mapping[str, Any],
    setting: str,
    changed: Sequence[Mapping[str, Any]],
    before: Sequence[Mapping[str, Any]],
) -> None:
    """Try a step of one small parameter from a state like the checkpoint's, with the old and with the new settings."""
    entry = next((entry for entry in state["state"].values() if entry), None)
    if entry is None:
        return
    for old, settings in zip(before, changed, strict=True):
        if _step_fails(optimizer, entry, old) is None and (error := _step_fails(optimizer, entry, {**old, **settings})):
            culprit = next((n for n in settings if _step_fails(optimizer, entry, {**old, n: settings[n]})), "")
            raise ConfigError(
                f"{setting}.{culprit}" if culprit else setting,
                settings.get(culprit, type(optimizer).__name__),
                f"the checkpoint was made with {short_value(old.get(culprit))} and its state does not serve this "
                f"({error}): write that again, or start a new run from the folder that `export` makes of the "
                "checkpoint",
            )


def _step_fails(optimizer: Optimizer, entry: Mapping[str, Any], settings: Mapping[str, Any]) -> str | None:
    group = {**optimizer.param_groups[0], **settings}
    device = group["params"][0].device
    parameter = torch.nn.Parameter(torch.zeros(2, 2, device=device))
    parameter.grad = torch.ones(2, 2, device=device)
    on_device = group.get("capturable") or group.get("fused")
    trial = copy.copy(optimizer)  # without its constructor, whose arguments are unknown here
    trial.state = defaultdict(dict)
    trial.state[parameter] = {
        name: (torch.zeros(2, 2, device=device) if value.ndim else value.to(device if on_device else "cpu", copy=True))
        if isinstance(value, Tensor)
        else value
        for name, value in entry.items()
    }
    trial.param_groups = [{**group, "params": [parameter]}]
    try:
        with torch.no_grad():
            trial.step()
    except Exception as error:
        return f"{type(error).__name__}: {' '.join(str(error).split())}"
    return None


def same(new: Any, old: Any) -> bool:
    """Whether two settings are equal; a tensor of one element counts as its value, to its precision."""
    if isinstance(new, Mapping) and isinstance(old, Mapping):
        return new.keys() == old.keys() and all(same(value, old[name]) for name, value in new.items())
    if isinstance(new, list | tuple) and isinstance(old, list | tuple):
        return len(new) == len(old) and all(map(same, new, old))
    kinds = [value.dtype for value in (new, old) if isinstance(value, Tensor)]
    if not kinds:
        return bool(plain(new) == plain(old))
    if not all(isinstance(value, Tensor | int | float) for value in (new, old)):
        return False
    kind = min(kinds, key=lambda kind: kind.itemsize)
    parts = [torch.as_tensor(value).to("cpu", kind) for value in (new, old)]
    return parts[0].numel() == parts[1].numel() and torch.equal(parts[0].flatten(), parts[1].flatten())


def short_value(value: Any) -> str:
    """A setting as short text; a tensor of one element as its value."""
    if isinstance(value, list | tuple) and any(isinstance(part, Tensor) for part in value):
        return short(tuple(float(f"{float(part):g}") for part in value))
    return short(value.item() if isinstance(value, Tensor) else value)


def copied(group: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: value.clone() if isinstance(value, Tensor) else value for name, value in group.items() if name != "params"
    }


def of_kind(here: Mapping[str, Any], group: Mapping[str, Any]) -> dict[str, Any]:
    """``group`` with tensors for numbers exactly where the configured group ``here`` has them."""
    return {
        name: _like(here[name], value) if name in here and name != "params" else value for name, value in group.items()
    }


def _like(pattern: Any, value: Any) -> Any:
    if isinstance(pattern, list | tuple) and isinstance(value, list | tuple) and len(pattern) == len(value):
        return type(value)(map(_like, pattern, value))
    if isinstance(pattern, Tensor) and isinstance(value, Tensor | int | float):
        return torch.as_tensor(value).detach().to(pattern.device, pattern.dtype, copy=True)
    if isinstance(value, Tensor) and isinstance(pattern, bool | int | float) and value.numel() == 1:
        return value.item()
    return value
