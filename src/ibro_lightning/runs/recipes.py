"""The recipes that ship with the package, found by name from any folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ibro_lightning.errors import ConfigError


def recipe_folder() -> Path:
    """``configs/`` in the installed package, or in the repository of an editable install."""
    package = Path(__file__).parents[1]
    installed = package / "configs"
    return installed if installed.is_dir() else package.parents[1] / "configs"


def recipe_names() -> list[str]:
    return sorted(path.name for path in recipe_folder().glob("*.yaml"))


def find_config(name: str) -> Path:
    """The file that ``name`` means: a path, or else a shipped recipe (with or without ``.yaml``)."""
    for candidate in (Path(name), recipe_folder() / name, recipe_folder() / f"{name}.yaml"):
        if candidate.is_file():
            return candidate
    raise ConfigError("--config", name, f"no such file or recipe: write a path, or one of {', '.join(recipe_names())}")


def resolve_configs(argv: Sequence[str]) -> list[str]:
    """Replace the name in every ``--config NAME`` by the path of its file."""
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
