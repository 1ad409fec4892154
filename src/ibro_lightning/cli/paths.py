"""The path of each object in a recipe, which precedes a field's name in an error."""

from __future__ import annotations

import inspect
import traceback
from collections.abc import Iterator, Mapping
from typing import Any

from jsonargparse import Namespace

from ibro_lightning.errors import ConfigError

CLASH_MARK = "\u200b"
"""What jsonargparse puts before the name of a setting that is also a method of its ``Namespace``."""
_PLAIN = (bool, int, float, str, type(None))


class RecipePaths:
    """Completes a :class:`ConfigError` with the path of the object whose field it names, e.g. ``model.regularizer``.

    The parser calls it in place of each class that it instantiates (``instantiators`` of
    ``ArgumentParser.instantiate``)."""

    def __init__(self, recipe: Namespace) -> None:
        self.recipe = recipe
        self._built: list[tuple[Any, Mapping[str, Any]]] = []  # keeps the objects alive, so that ids stay unique
        self._paths: dict[int, str] = {}

    def __call__(self, kind: type, *args: Any, **settings: Any) -> Any:
        try:
            built = kind(*args, **settings)
        except ConfigError as error:
            # A class of the user's may pass a value on to a base of ours, which has another name for it.
            if not error.path and (_root(error.field) in settings or not kind.__module__.startswith("ibro_lightning.")):
                found = (path for path, given in settings_in(self.recipe, groups=True) if _same(given, settings, kind))
                error.path = next(found, "")
            raise
        self._built.append((built, settings))
        return built

    def name(self, built: Mapping[str, Any]) -> None:
        """Record the path of every object in the configuration after instantiation."""
        settings_of = self._settings()

        def visit(value: Any, path: str) -> None:
            if id(value) in settings_of:
                self._paths[id(value)] = path
                value = settings_of[id(value)]
            for key, part in _parts(value, path):
                visit(part, key)

        visit(built, "")
        for owner, settings in tuple(self._built):  # an object that a constructor makes of null has null's path
            if id(owner) not in self._paths or not _is_ours(owner):
                continue
            for name in (name for name, value in settings.items() if value is None):
                default = getattr(owner, name, None)
                if _is_ours(default):
                    self._built.append((default, dict.fromkeys(inspect.signature(type(default)).parameters)))
                    self._paths[id(default)] = f"{self._paths[id(owner)]}.{name}"

    def complete(self, error: ConfigError) -> None:
        """Set the path of the innermost object on the traceback that has the error's field: one whose method runs, or
        else one that a function of ours works on."""
        settings_of = self._settings()
        frames = [frame for frame, _ in reversed(list(traceback.walk_tb(error.__traceback__)))]
        ours = [frame for frame in frames if str(frame.f_globals.get("__name__")).startswith("ibro_lightning.")]
        owners = [frame.f_locals.get("self") for frame in frames]
        for owner in map(id, (*owners, *(value for frame in ours for value in frame.f_locals.values()))):
            if not error.path and _root(error.field) in settings_of.get(owner, {}):
                error.path = self._paths.get(owner, "")

    def _settings(self) -> dict[int, Mapping[str, Any]]:
        return {id(built): settings for built, settings in self._built}


def _is_ours(value: Any) -> bool:
    """Whether its class is ours or derives from ours. Reading attributes of others may change them."""
    return any(kind.__module__.startswith("ibro_lightning.") for kind in type(value).__mro__)


def settings_in(value: Any, path: str = "", *, groups: bool = False) -> Iterator[tuple[str, Any]]:
    """Every single setting, or every group of settings, with its path as the user types it: without ``init_args``."""
    parts = list(_parts(value, path))
    if path and (isinstance(value, Mapping | Namespace) if groups else not parts):
        yield path, value
    for key, part in parts:
        yield from settings_in(part, key, groups=groups)


def _parts(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping | Namespace):
        for key, part in _plain(value).items():
            if path and key in ("init_args", "dict_kwargs"):
                yield from _parts(part, path)
            else:
                yield f"{path}.{key}".removeprefix("."), part
    elif isinstance(value, list | tuple):
        for index, part in enumerate(value):
            yield f"{path}[{index}]", part


def _same(given: Any, settings: Mapping[str, Any], kind: type) -> bool:
    """Whether a group of the recipe holds the settings of an object of ``kind``, judging by numbers and strings."""
    given = _plain(given)
    if "class_path" in given:
        if str(given["class_path"]).rpartition(".")[2] != kind.__name__:
            return False
        given = _plain(given.get("init_args") or {}) | _plain(given.get("dict_kwargs") or {})
    plain = {key: value for key, value in settings.items() if isinstance(value, _PLAIN)}
    return set(given) == set(settings) and all(repr(given[key]) == repr(value) for key, value in plain.items())


def _plain(group: Any) -> dict[str, Any]:
    """A group's own keys; iterating over a ``Namespace`` also yields those of nested groups. It marks names that its
    own methods have, such as ``values``."""
    if isinstance(group, Namespace):
        return {key.removeprefix(CLASH_MARK): value for key, value in vars(group).items()}
    return dict(group)


def _root(field: str) -> str:
    return field.partition(".")[0].partition("[")[0]
