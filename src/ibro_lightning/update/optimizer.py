"""Builds optimizers with their learning rates, and the schedules of these rates.

One rule for the learning rate: an ``lr`` that is set for the optimizer counts; otherwise the module's ``learning_rate``
does, never the default of the optimizer's class, which is a thousand times too high for a policy.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from ibro_lightning.errors import NO_PLATEAU, ConfigError
from ibro_lightning.ranks import rank_zero_info


def build_optimizer(
    factory: Callable[..., Optimizer],
    parameters: list[nn.Parameter],
    learning_rate: float,
    *,
    setting: str,
    rate_setting: str,
    default_rate: float | None = None,
) -> Optimizer:
    """Build the optimizer of the parameters.

    A factory that takes ``lr`` is given the learning rate, unless one is bound to it. From any other factory, a rate
    other than the default of the optimizer's class counts as set.

    Args:
        factory: an optimizer's class, a partial of one, or a function.
        setting: the factory's name in the configuration, for errors.
        rate_setting: the name of ``learning_rate`` there.
        default_rate: the default of ``learning_rate``, which may differ from the optimizer's own rate.

    Raises:
        ConfigError: the optimizer refuses its settings or cannot be used here, or both learning rates are set and
            differ.
    """
    check_optimizer(factory, setting)
    target, bound = _unwrapped(factory)
    takes = None if bound.get("lr") is not None else _takes_rate(target)
    try:
        optimizer = _call(factory, parameters, learning_rate, takes)
    except (TypeError, ValueError) as error:
        raise ConfigError(setting, _name(factory), f"the optimizer refuses its settings: {error}") from error
    if not isinstance(optimizer, Optimizer):
        raise ConfigError(setting, _name(factory), f"it gives a {type(optimizer).__name__}, not a torch optimizer")
    check_optimizer(type(optimizer), setting)
    if takes == "lr":
        return optimizer
    own = bound.get("lr") or optimizer.defaults.get("lr")
    if not bound.get("lr") and own is not None and own != learning_rate and own == _class_default_rate(type(optimizer)):
        if not isinstance(target, type):
            rank_zero_info(
                f"model.{setting}: lr {own:g} is what {type(optimizer).__name__} has by default, so "
                f"model.{rate_setting} counts: {learning_rate:g}"
            )
        for settings in (optimizer.defaults, *optimizer.param_groups):
            if settings["lr"] == own:
                settings["lr"] = learning_rate
    elif own is not None and learning_rate not in (default_rate, float(own)):
        raise ConfigError(rate_setting, learning_rate, f"{setting} has lr {float(own):g}: write one of them")
    return optimizer


def check_optimizer(factory: Any, setting: str) -> None:
    """Refuse what is no optimizer, or no usable one, as far as can be told before it is built."""
    if not callable(factory):
        raise ConfigError(
            setting, factory, "write an optimizer's class, such as torch.optim.AdamW, or a function of parameters"
        )
    kind = class_of(factory)
    if kind is None:
        return
    if not issubclass(kind, Optimizer):
        raise ConfigError(setting, kind.__name__, "it is not a torch optimizer: write one, such as AdamW")
    closure = inspect.signature(kind.step).parameters.get("closure")
    if closure is not None and closure.default is closure.empty:
        remedy = "its step computes the loss several times, which no update here does: write another, such as AdamW"
        raise ConfigError(setting, kind.__name__, remedy)
    if issubclass(kind, torch.optim.SparseAdam):
        raise ConfigError(setting, kind.__name__, "gradients are dense here: write another, such as AdamW")


def _call(
    factory: Callable[..., Optimizer], parameters: list[nn.Parameter], learning_rate: float, takes: str | None
) -> Optimizer:
    if takes is not None:
        try:
            return factory(parameters, lr=learning_rate)
        except TypeError:
            if takes == "lr":
                raise  # otherwise its **kwargs are not for an lr
    return factory(parameters)


def _takes_rate(target: Any) -> str | None:
    """How a class or function takes an ``lr``: as ``lr``, as part of its ``kwargs``, or not at all."""
    try:
        parameters = inspect.signature(target).parameters
    except (TypeError, ValueError):
        return None
    if "lr" in parameters:
        return "lr"
    return "kwargs" if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()) else None


def _class_default_rate(kind: Callable[..., Optimizer]) -> Any:
    """The default ``lr`` of an optimizer's class; None without one."""
    try:
        return kind([nn.Parameter(torch.zeros(2, 2))]).defaults.get("lr")
    except (TypeError, ValueError):
        return None


def _unwrapped(factory: Any) -> tuple[Any, dict[str, Any]]:
    """The class or function within partials, and the keywords they bind."""
    if not isinstance(factory, partial):
        return factory, {}
    target, bound = _unwrapped(factory.func)
    return class_of(factory) or target, {**bound, **factory.keywords}


def default_rate(kind: type, name: str) -> float | None:
    """The default of a module's learning rate ``name``, in the nearest class with it in its signature."""
    for base in kind.__mro__:
        parameter = inspect.signature(vars(base)["__init__"]).parameters.get(name) if "__init__" in vars(base) else None
        if parameter is not None and parameter.default not in (parameter.empty, None):
            return float(parameter.default)
    return None


def class_of(factory: Any) -> type | None:
    """The class of the objects that a factory makes, where that is clear without calling it."""
    if isinstance(factory, partial):
        # jsonargparse's partials call a function of its own with the class.
        parts = factory.args if getattr(factory.func, "__module__", "").startswith("jsonargparse") else ()
        return class_of(factory.func) or next((found for part in parts if (found := class_of(part))), None)
    return factory if isinstance(factory, type) else None


def _name(factory: Any) -> str:
    kind = class_of(factory)
    return getattr(kind or factory, "__name__", type(factory).__name__)


def qualified_name(kind: type) -> str:
    """A class's name in a configuration; without the module for torch's own optimizers and schedulers."""
    public = (
        getattr(torch.optim, kind.__name__, None) is kind
        or getattr(torch.optim.lr_scheduler, kind.__name__, None) is kind
    )
    return kind.__name__ if public else f"{kind.__module__}.{kind.__qualname__}"


def check_schedule(factory: Any, setting: str) -> None:
    """Refuse a schedule that cannot move with every optimizer step, before anything is built."""
    if factory is not None and not callable(factory):
        raise ConfigError(setting, factory, "write what makes a schedule of an optimizer, such as a scheduler's class")
    kind = class_of(factory)
    if kind is not None and issubclass(kind, ReduceLROnPlateau):
        raise ConfigError(setting, kind.__name__, NO_PLATEAU)


class Schedule:
    """The learning rate from step to step: a linear warm-up, then a torch scheduler.

    In the first ``warmup_steps`` steps the rate is (s + 1)/(warmup_steps + 1) of the scheduler's first. Only then
    does the scheduler begin to move: its ``T_max``, ``milestones``, … count from the end of the warm-up.

    Loading a state with other settings keeps only its position: the schedule is replayed up to there.

    Args:
        optimizer: the ``lr`` of its groups is set.
        factory: called with the optimizer; the result is stepped with every optimizer step.
        warmup_steps: optimizer steps in which the rate rises.
        settings: plain values on which ``factory`` depends, by name, to compare with those of a checkpoint.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        factory: Callable[[Optimizer], Any],
        warmup_steps: int = 0,
        settings: Mapping[str, Any] | None = None,
        setting: str = "lr_scheduler",
    ) -> None:
        self.optimizer, self.warmup_steps = optimizer, warmup_steps
        self.settings = {"warmup_steps": warmup_steps, **(settings or {})}
        self.last_epoch = 0
        """Steps taken so far, under torch's name."""
        try:
            self.scheduler = factory(optimizer)
        except (TypeError, ValueError) as error:
            raise ConfigError(setting, _name(factory), f"the schedule refuses its settings: {error}") from error
        if isinstance(self.scheduler, ReduceLROnPlateau):
            raise ConfigError(setting, type(self.scheduler).__name__, NO_PLATEAU)
        if not isinstance(self.scheduler, LRScheduler):
            remedy = f"it gives a {type(self.scheduler).__name__}, not an LRScheduler"
            raise ConfigError(setting, _name(factory), remedy)
        self._start = copy.deepcopy(self.scheduler.state_dict())
        self._full = [group["lr"] for group in optimizer.param_groups]
        self.changes: list[str] = []
        """Settings that differ from the loaded checkpoint's, as text."""
        self._warm_up()

    def step(self) -> None:
        self.last_epoch += 1
        if self.last_epoch > self.warmup_steps:
            self.scheduler.step()
        else:
            self._warm_up()

    def _warm_up(self) -> None:
        factor = min(1.0, (self.last_epoch + 1) / (self.warmup_steps + 1))
        for group, full in zip(self.optimizer.param_groups, self._full, strict=True):
            group["lr"] = full * factor

    def get_last_lr(self) -> list[float]:
        return [group["lr"] for group in self.optimizer.param_groups]

    def state_dict(self) -> dict[str, Any]:
        return {
            "last_epoch": self.last_epoch,
            "kind": qualified_name(type(self.scheduler)),
            "warmup_steps": self.warmup_steps,
            "settings": self.settings,
            "start": self._start,
            "scheduler": self.scheduler.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resume at the position of ``state``; older checkpoints hold a plain scheduler's, which gives no more."""
        here = self.state_dict()
        same = ("kind", "warmup_steps", "settings", "start")
        if "start" in state and all(plain(here[name]) == plain(state[name]) for name in same):
            self.last_epoch = state["last_epoch"]
            self.scheduler.load_state_dict(state["scheduler"])
            return
        self.changes = _differences(here, state) if "start" in state else []
        for group, full in zip(self.optimizer.param_groups, self._full, strict=True):
            group["lr"] = full
        self._warm_up()
        for _ in range(state["last_epoch"]):
            # Or torch would warn of a scheduler that steps before its optimizer.
            setattr(self.optimizer, "_opt_called", True)  # noqa: B010 - for mypy
            self.step()


_POSITION = ("base_lrs", "last_epoch", "_step_count", "_last_lr", "_get_lr_called_within_step", "_is_initial")


def _differences(here: Mapping[str, Any], saved: Mapping[str, Any]) -> list[str]:
    """``name value (checkpoint: value)`` of each changed setting; the optimizer reports the learning rate itself."""
    named = [("lr_scheduler", here["kind"], saved["kind"])]
    named += [(name, value, saved["settings"].get(name)) for name, value in here["settings"].items()]
    if here["kind"] == saved["kind"]:
        start = saved["start"]
        named += [
            (f"lr_scheduler.{name}", value, start.get(name))
            for name, value in here["start"].items()
            if name not in _POSITION and not name.startswith("_")
        ]
    return [f"{n} {short(new)} (checkpoint: {short(old)})" for n, new, old in named if plain(new) != plain(old)]


def short(value: Any) -> str:
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return text if len(text) <= 60 else text[:59] + "…"


def plain(value: Any) -> Any:
    """A setting in a comparable form: tuples as lists, mappings of any class as dictionaries."""
    if isinstance(value, Mapping):
        return {name: plain(item) for name, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, list | tuple) else value
