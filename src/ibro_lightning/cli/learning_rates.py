"""An optimizer's own ``lr`` and its module's ``learning_rate`` are one setting; a recipe may have either."""

from __future__ import annotations

import copy
import importlib
import inspect
import re
import sys
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from ibro_lightning.errors import ConfigError
from ibro_lightning.update.optimizer import default_rate

RATES = {"optimizer": "learning_rate", "critic_optimizer": "critic_learning_rate"}
"""A module's optimizer arguments → the arguments that hold their learning rates."""


def settle_learning_rates(config: Any) -> None:
    """Move an optimizer's own ``lr`` to the module's learning rate, in place, or raise :class:`ConfigError` if both are
    on the command line and differ. :func:`one_rate` does so for recipe files."""
    model: Any = config.get("model") if config is not None and hasattr(config, "get") else None
    settings: Any = model.get("init_args") if hasattr(model, "get") else None
    if not hasattr(settings, "get"):
        return
    for name, rate in RATES.items():
        optimizer: Any = settings.get(name)
        holder = _holder_of_rate(optimizer)
        package, _, kind = str(model.get("class_path")).rpartition(".")
        if not package or rate not in settings or holder is None:
            continue
        if holder["lr"] is None:
            holder.pop("lr")
            continue
        if not holder["lr"] >= 0:
            continue  # the optimizer refuses it, under the name that the user wrote
        default = default_rate(getattr(importlib.import_module(package), kind), rate)
        if (not _written(name) or _written(rate)) and settings[rate] not in (default, holder["lr"]):
            remedy = f"model.{name} has lr {holder['lr']:g}: write one of them"
            raise ConfigError(f"model.{rate}", settings[rate], remedy)
        settings[rate] = holder.pop("lr")


def _holder_of_rate(optimizer: Any) -> Any:
    """The mapping in an optimizer's configuration that holds its ``lr``; None if there is none."""
    parts = [optimizer.get(part) for part in ("init_args", "dict_kwargs")] if hasattr(optimizer, "get") else []
    return next((part for part in parts if hasattr(part, "get") and "lr" in part), None)


def _written(name: str) -> bool:
    """Whether the command line sets an argument of the model, or a part of it."""
    return any(re.match(rf"--model\.(init_args\.)?{name}(?=[.=]|$)", argument) for argument in sys.argv)


def one_rate(recipe: dict[str, Any]) -> dict[str, Any]:
    """A recipe with an optimizer's ``lr`` moved to its model's learning rate, so that later settings override it.
    Raises :class:`ConfigError` if it has both, and they differ."""
    recipe = copy.deepcopy(recipe)
    model: Any = recipe.get("model")
    settings: Any = model.get("init_args") if isinstance(model, dict) else None
    for name, rate in RATES.items() if isinstance(settings, dict) else ():
        holder = _holder_of_rate(settings.get(name))
        if holder is None or not _takes(model.get("class_path"), rate):
            continue
        lr = holder["lr"]
        if lr is None:
            holder.pop("lr")
        elif isinstance(lr, int | float) and lr >= 0:
            if settings.get(rate, lr) != lr:
                raise ConfigError(f"model.{rate}", settings[rate], f"model.{name} has lr {lr:g}: write one of them")
            settings[rate] = holder.pop("lr")
    return recipe


def _takes(class_path: Any, name: str) -> bool:
    """Whether the class at ``class_path`` has an argument ``name``; True if the class cannot be found."""
    if not isinstance(class_path, str):
        return True
    package, _, kind = class_path.rpartition(".")
    try:
        module_class = getattr(importlib.import_module(package or "ibro_lightning.modules"), kind)
    except (ImportError, AttributeError):
        return True
    for base in (base for base in module_class.__mro__ if "__init__" in vars(base)):
        parameters = inspect.signature(base.__init__).parameters
        if name in parameters:
            return True
        if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
            return False
    return False


def refuse_no_rate(argv: Sequence[str]) -> None:
    """Raise :class:`ConfigError` for a null ``lr``, for which the parser would list every type that ``lr`` accepts."""
    for argument, value in pairwise([part for whole in argv for part in whole.split("=", 1)] + [""]):
        match = re.fullmatch(r"--(?:model\.(?:init_args\.)?)?(critic_)?optimizer\.(?:init_args\.)?lr", argument)
        if match and value.lower() in ("null", "none", "~"):
            remedy = f"write a number, or leave it out: model.{match[1] or ''}learning_rate is used then"
            raise ConfigError(argument[2:], None, remedy)
