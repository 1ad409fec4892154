"""What is written on the command line: recipes by name, and errors of one line."""

from __future__ import annotations

import difflib
import importlib
import inspect
import re
import sys
from collections.abc import Iterator, Sequence
from typing import NoReturn

from lightning.pytorch.cli import LightningArgumentParser

from ibro_lightning.recipes import find_config


class OneLineParser(LightningArgumentParser):
    """Reports a bad setting in one line, with the nearest name that would have been right."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        text = " ".join(str(message).split())
        sys.stderr.write(f"error: {text}{self._suggest(text)}\n")
        raise SystemExit(2)

    def _suggest(self, text: str) -> str:
        if unknown := re.search(r"[Oo]ption '([\w.]+)' is not accepted|[Kk]ey \"([\w.]+)\" is not", text):
            name = unknown[1] or unknown[2]
            near = difflib.get_close_matches(name, [action.dest for action in self._actions], n=1)
            return f" - did you mean {near[0]}?" if near else ""
        if base := re.search(r"<class '(ibro_lightning[\w.]*)\.(\w+)'>.*Expected a dot import path string", text):
            classes = [c.__name__ for c in _subclasses(getattr(importlib.import_module(base[1]), base[2]))]
            return f" - write one of {', '.join(sorted(classes))}, or module.Class of your own" if classes else ""
        return ""


def _subclasses(base: type) -> Iterator[type]:
    """The concrete classes below ``base`` that are imported."""
    subclass: type
    for subclass in base.__subclasses__():
        if not inspect.isabstract(subclass):
            yield subclass
        yield from _subclasses(subclass)


def resolve_configs(argv: Sequence[str]) -> list[str]:
    """Replace every ``--config NAME`` by the file it stands for."""
    resolved: list[str] = []
    expects_config = False
    for argument in argv:
        if expects_config:
            argument, expects_config = str(find_config(argument)), False
        elif argument in ("--config", "-c"):
            expects_config = True
        elif argument.startswith("--config="):
            argument = f"--config={find_config(argument.removeprefix('--config='))}"
        resolved.append(argument)
    return resolved
