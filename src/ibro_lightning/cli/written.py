"""What the user has written: the flags of the command line, and the recipes that it names."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml

from ibro_lightning.cli.paths import settings_in

MISSING = "missing - "
"""In place of the value of a required setting that is not given."""


def keys_of(name: str) -> tuple[str, ...]:
    return tuple(key for key in name.split(".") if key not in ("init_args", "dict_kwargs"))


def as_written(keys: tuple[str, ...], value: str | None) -> tuple[str, str | None]:
    """A setting's name and value as on the command line or in a recipe: with the keys and indices of mappings and
    lists, which the parser omits."""
    for name, given in written_settings():
        written = re.sub(r"\[\d+\]", "", name).split(".")
        rest = iter(written)
        if written[-1] == keys[-1] and all(key in rest for key in keys) and value in (None, MISSING, str(given)):
            return name, value or str(given)
    return ".".join(keys), value


def written_settings() -> Iterator[tuple[str, Any]]:
    flags = [part for whole in sys.argv[1:] for part in (whole.split("=", 1) if whole.startswith("--") else [whole])]
    for flag, value in pairwise([*flags, ""]):
        if flag.startswith("--"):
            name = ".".join(keys_of(flag[2:]))
            yield name, value
            if value[:1] in ("[", "{"):
                with suppress(yaml.YAMLError):
                    yield from settings_in(yaml.safe_load(value), name)
    for path in named_recipes():
        with suppress(yaml.YAMLError, OSError, UnicodeDecodeError):
            yield from settings_in(yaml.safe_load(path.read_text()))


def named_recipes() -> Iterator[Path]:
    """The recipes that the command line names."""
    for argument in sys.argv[1:]:
        path = Path(argument.removeprefix("--config="))
        if path.suffix in (".yaml", ".yml") and path.is_file():
            yield path


def is_yaml(path: Path) -> bool:
    try:
        yaml.safe_load(path.read_text())
    except (yaml.YAMLError, OSError, UnicodeDecodeError):
        return False
    return True
