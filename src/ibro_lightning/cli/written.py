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
ENTRY = "<entry>"
"""In place of the key of a mapping or the index of a list, which the parser does not say."""


def keys_of(name: str) -> tuple[str, ...]:
    return tuple(key for key in name.split(".") if key not in ("init_args", "dict_kwargs"))


def as_written(keys: tuple[str, ...], value: str | None, kind: type | None = None) -> tuple[str, str | None]:
    """A setting's name and value as on the command line or in a recipe: with the keys and indices of mappings and
    lists, which the parser omits. ``kind`` is the class that has the setting."""
    if value == MISSING:
        return _place_without(keys, kind), value
    keys = tuple(key for key in keys if key != ENTRY)
    for name, given in written_settings():
        written = re.sub(r"\[\d+\]", "", name).split(".")
        rest = iter(written)
        if written[-1] == keys[-1] and all(key in rest for key in keys) and value in (None, str(given)):
            return name, value or str(given)
    return ".".join(keys), value


def _place_without(keys: tuple[str, ...], kind: type | None) -> str:
    """The name of a setting that is missing: in those entries of mappings and lists which are of its class, and lack
    it."""
    *outer, last = keys
    place = re.compile(re.escape(".".join(outer)).replace(f"\\.{ENTRY}", r"(?:\.[^.\[]+|\[\d+\])") + r"(?=\.|$)")
    given = dict(reversed([*written_settings()]))
    for name in given if ENTRY in keys else ():
        if (found := place.match(name)) is None:
            continue
        chosen = given.get(f"{found[0]}.class_path", given.get(found[0]))
        missing = f"{found[0]}.{last}"
        is_of_kind = kind is None or chosen is None or str(chosen).rpartition(".")[2] == kind.__name__
        if is_of_kind and not any(re.match(rf"{re.escape(missing)}(?![^.\[])", other) for other in given):
            return missing
    return ".".join(key for key in keys if key != ENTRY)


def written_settings() -> Iterator[tuple[str, Any]]:
    flags = [part for whole in sys.argv[1:] for part in (whole.split("=", 1) if whole.startswith("--") else [whole])]
    for flag, value in pairwise([*flags, "--"]):
        if flag.startswith("--") and not value.startswith("--"):
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
