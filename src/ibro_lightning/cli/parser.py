"""Parses the command line: recipes by name, optimizers as in LightningCLI, one-line errors."""

from __future__ import annotations

import re
import sys
from argparse import SUPPRESS, Action, HelpFormatter
from collections.abc import Sequence
from types import NoneType
from typing import Any, NoReturn, get_args

from jsonargparse import DefaultHelpFormatter, Namespace
from jsonargparse._common import lenient_check
from lightning.pytorch.cli import LightningArgumentParser
from torch.optim import Optimizer

from ibro_lightning.cli.learning_rates import one_rate, refuse_no_rate, settle_learning_rates
from ibro_lightning.cli.offers import NOT_OFFERED
from ibro_lightning.cli.paths import RecipePaths
from ibro_lightning.cli.refusals import explain
from ibro_lightning.errors import ConfigError
from ibro_lightning.guards.endings import explanation

SHORT = ("optimizer", "lr_scheduler")
"""Top-level keys of LightningCLI that are arguments of the model here."""


class OfferedHelp(DefaultHelpFormatter):
    """Lists the classes to choose from without those that are refused."""

    def _get_help_string(self, action: Action) -> str:
        text: str = super()._get_help_string(action)
        head, mark, paths = text.rpartition(", known subclasses: ")
        kept = [path for path in paths.rstrip(")").split(", ") if path.rpartition(".")[2] not in NOT_OFFERED]
        return f"{head}{mark}{', '.join(kept)})" if mark else text


class OneLineParser(LightningArgumentParser):
    """Reports a bad setting in one line, with the closest valid name.

    An optimizer's ``lr`` has no default here: the module's ``learning_rate`` provides it, and the two are merged before
    they are printed, saved or used.
    """

    _of_optimizer = False
    """Whether this parser reads the arguments of an optimizer."""
    of_class: type | None = None
    """The class in a recipe whose arguments this parser reads; None for the whole recipe's parser."""
    paths: RecipePaths
    trusts_commands = True
    """Whether what a command's own parser has completed and checked is taken as it is by the parser of all commands."""

    def __init__(self, *args: Any, formatter_class: type[HelpFormatter] = OfferedHelp, **kwargs: Any) -> None:
        super().__init__(*args, formatter_class=formatter_class, **kwargs)

    def add_class_arguments(self, theclass: Any, *args: Any, **kwargs: Any) -> Any:
        self.of_class = theclass
        added = super().add_class_arguments(theclass, *args, **kwargs)
        if isinstance(theclass, type) and issubclass(theclass, Optimizer):
            self._of_optimizer = True
            for action in self._actions:
                if action.dest == "lr":
                    action.default, action.required = SUPPRESS, False
        return added

    def _parse_common(self, cfg: Any, *args: Any, **kwargs: Any) -> Any:
        for part in (cfg, *(cfg.get(name) for name in ("fit", "validate", "test", "predict"))):
            settle_learning_rates(part)
        if self._of_commands and isinstance(cfg.get(cfg.get("subcommand") or ""), Namespace):
            kwargs["defaults"] = False
        return super()._parse_common(cfg, *args, **kwargs)

    def _check_value_key(self, action: Action, value: Any, key: str, *args: Any, **kwargs: Any) -> Any:
        if self._of_optimizer and args and not args[0] and not lenient_check.get():
            # The parser is checking whether a setting of another class, default or not, fits this one.
            raise TypeError(f"{key} is of another optimizer")
        if self._of_commands and "." in key and not lenient_check.get():
            return value
        # The parser takes null for an argument that is not given yet, so it would reach the constructor.
        hint = getattr(action, "_typehint", None)
        kinds = [kind for kind in (hint, *get_args(hint)) if kind in (int, float)]
        if value is None and kinds and action.default not in (None, SUPPRESS) and NoneType not in get_args(hint):
            raise TypeError(f'Parser key "{key}":\n  Expected a {kinds[0]}. Got value: None')
        return super()._check_value_key(action, value, key, *args, **kwargs)

    def _apply_actions(self, cfg: Any, *args: Any, **kwargs: Any) -> Any:
        # A recipe's raw content: class names are resolved only at their final place.
        if isinstance(cfg, dict) and any(action.dest == "model" for action in self._actions):
            cfg = one_rate(_short_to_long(cfg))
        return super()._apply_actions(cfg, *args, **kwargs)

    @property
    def _of_commands(self) -> bool:
        return self.trusts_commands and self._subcommands_action is not None

    def instantiate_classes(self, cfg: Any, **kwargs: Any) -> Any:
        command = cfg.get("subcommand")
        self.paths = RecipePaths(cfg[command] if command else cfg)
        try:
            built = super().instantiate_classes(cfg, instantiators=[(self.paths, object, True)], **kwargs)
        except ValueError as error:  # the parser wraps it in a list of all types that it has tried
            if isinstance(own := explanation(error), ConfigError):
                raise own from None
            raise
        self.paths.name(built[command] if command else built)
        return built

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        refused = explain(self, str(message), ex)
        if not self.exit_on_error:  # a class in a recipe: the recipe's parser completes the message
            raise refused from ex
        sys.stderr.write(f"error: {' '.join(refused.line().split())}\n")
        raise SystemExit(2)


def _short_to_long(recipe: dict[str, Any]) -> dict[str, Any]:
    """A recipe with its top-level ``optimizer`` and ``lr_scheduler`` moved to the model's arguments."""
    short = {name: recipe[name] for name in SHORT if name in recipe}
    if not short:
        return recipe
    model = recipe.get("model") or {}
    model = {"class_path": model} if isinstance(model, str) else model
    settings = {**(model.get("init_args") or {}), **short}
    return {**{k: v for k, v in recipe.items() if k not in SHORT}, "model": {**model, "init_args": settings}}


def long_names(argv: Sequence[str]) -> list[str]:
    """LightningCLI's ``--optimizer`` and ``--lr_scheduler`` as arguments of the model. They go last, since ``--model``
    may name the class that they belong to."""
    refuse_no_rate(argv)
    first: list[str] = []
    last: list[str] = []
    current = first
    for argument in argv:
        if argument.startswith("--"):
            short = re.match(rf"--({'|'.join(SHORT)})(?=[.=]|$)", argument)
            current = last if short else first
            argument = f"--model.{argument[2:]}" if short else argument
        current.append(argument)
    return first + last
