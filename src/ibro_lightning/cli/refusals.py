"""The parser's errors in one line: the setting as the user writes it, its value, and the remedy."""

from __future__ import annotations

import difflib
import inspect
import re
import sys
from argparse import SUPPRESS, Action, ArgumentError
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import fields, is_dataclass
from datetime import timedelta
from itertools import pairwise
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

import yaml
from torch import Tensor

from ibro_lightning.cli.paths import settings_in
from ibro_lightning.errors import NO_PLATEAU, ConfigError

_KEY = re.compile(r'(?:Parser key "|argument --)([\w.]+)')
_UNKNOWN = re.compile(r"ption '([\w.]+)' is not accepted|does not accept option '([\w.]+)'")
_COMMAND = re.compile(r"^Subcommand '(\w+)'|required: (\w+)\.")
_HELP = re.compile(r"--([\w.]+)\.help: .*: (\S+)$")
_UNRECOGNIZED = re.compile(r"unrecognized arguments: (?:--)?([^\s=]+)(?:[\s=](.*))?")
_MISSING = re.compile(r"required: ([\w.]+)|argument --([\w.]+): expected")
_VALUE = re.compile(r"(?:Got value: |Given value: |path string: |load config ['\"])(.*?)['\"]?(?:\n|$)")
_NESTED = re.compile(r"NestedArg\(key='([\w.]+)', val='?(.*?)'?\)$")
_IMPORT = re.compile(r"Problem with given class_path '([^']+)':\s*(.*)", re.DOTALL)
_CLASS = re.compile(r"(?:given class_path '|Import path |class, but )([\w.]+)")
_NO_SUBCLASS = re.compile(r"does not correspond to a subclass of (\w+)|is abstract")
OURS = "ibro_lightning"
BAD_YAML = "Problems parsing config: "
MISSING = "missing - "
"""In place of the value of a required setting that is not given."""
NOT_OFFERED = ("PolicyLossMethod", "CorrectPathEntropySuppression", "GoldTrial")
"""A base class, a former name, and what the pool builds: no message names them among those to choose from."""
DEMOS = "lightning.pytorch.demos"
"""Lightning's examples, known once somebody imports them."""
MANY = 16
"""Above this number, classes of other packages are not listed."""
_WORDS: dict[Any, str] = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
_WORDS |= {NoneType: "null", Path: "a path", timedelta: "a time, such as 00:30:00", Any: "another value"}


class Refused(ArgumentError):
    """A setting that the parser of one class refuses: the path from that class to it, and its value, None for null."""

    def __init__(self, keys: tuple[str, ...], value: str | None, remedy: str) -> None:
        super().__init__(None, remedy)
        self.keys, self.value, self.remedy = keys, value, remedy

    def line(self) -> str:
        if not self.keys:
            return self.remedy
        key, value = _as_written(self.keys, self.value)
        if value in (None, "None", MISSING):
            return f"{key}: {'null - ' if value == 'None' else value or ''}{self.remedy}"
        return str(ConfigError(key, value, self.remedy))


def explain(parser: Any, message: str, cause: BaseException | None) -> Refused:
    """A parser's error as a :class:`Refused`. What the parser caught may wrap the one of a nested class's parser."""
    keys = _keys(found[1]) if (found := _KEY.search(message)) else ()
    while cause is not None and not isinstance(cause, Refused):
        if isinstance(cause, ConfigError):
            return Refused((), None, str(cause))
        cause = cause.__cause__
    if cause is not None:
        return Refused((*keys, *cause.keys), cause.value, cause.remedy)
    if message.startswith(BAD_YAML):
        return _not_yaml(message.removeprefix(BAD_YAML))
    if (command := _COMMAND.search(message)) and parser._subcommands_action is not None:
        parser = parser._subcommands_action.choices[command[1] or command[2]]
    if of_class := _HELP.search(message):
        return _wrong_value(parser, _keys(of_class[1]), of_class[2], message)
    if unknown := _UNKNOWN.search(message):
        return _unknown(parser, unknown[1] or unknown[2], None)
    if unknown := _UNRECOGNIZED.search(message):
        return _unknown(parser, unknown[1], unknown[2])
    if missing := _MISSING.search(message):
        name = (missing[1] or missing[2]).removeprefix(f"{command[2]}." if command else "")
        if name in ("data", "model") and not any(True for _ in _recipes()):
            return Refused(_keys(name), MISSING, "write --config RECIPE, such as --config quickstart.yaml")
        return Refused(_keys(name), MISSING, f"write {expected(_hint(parser, name))}")
    values = _VALUE.findall(message) or _CLASS.findall(message)
    if not keys or not values:
        return Refused((), None, message)
    return _wrong_value(parser, keys, values[-1].strip(), message)


def _unknown(parser: Any, name: str, value: str | None) -> Refused:
    names = sorted({action.dest for action in parser._actions if action.dest not in ("help", "print_shtab", SUPPRESS)})
    near = difflib.get_close_matches(name, names, n=1)
    group, _, rest = name.partition(".")
    if rest and group not in (groups := {name.partition(".")[0] for name in names}):  # the whole group has a wrong name
        renamed = difflib.get_close_matches(group, groups, n=1)
        near = [whole for whole in (f"{first}.{rest}" for first in renamed) if whole in names]
        name, value, near = (name, value, near) if near else (group, None, renamed)
    owner = "the command line" if parser.exit_on_error else parser.of_class.__name__
    if not parser.exit_on_error and (others_have := _owners(parser.of_class, name)):
        return Refused(_keys(name), value, f"{owner} has no such setting: {_either(others_have)} has it")
    others = ", ".join(name for name in names if "." not in name) or "none"
    hint = f"did you mean {near[0]}?" if near else f"it has {others}"
    return Refused(_keys(name), value, f"{owner} has no such setting: {hint}")


def _wrong_value(parser: Any, keys: tuple[str, ...], value: str, message: str) -> Refused:
    hint = _hint(parser, ".".join(keys))
    if "subclasses with name ReduceLROnPlateau" in message:
        return Refused(keys, "ReduceLROnPlateau", NO_PLATEAU)
    if nested := _NESTED.match(value):
        inner, value = nested[1], nested[2]
        if "is abstract" in message:
            remedy = f"it belongs to a class: write {keys[-1]} as {_classes(list(_bases(hint)))} first"
            return Refused((*keys, *_keys(inner)), value, remedy)
    reason = ""
    if problem := _IMPORT.search(message):
        value, cause = problem[1], problem[2].splitlines()[0].strip()
        reason = f"cannot be imported ({cause}): "
        if (moved := _moved(value, _bases(hint))) is not None and _path(moved) == value:
            return Refused(keys, value, f"one of its settings: {cause}")
        if moved is not None:
            return Refused(keys, value, f"this class has moved: write {moved.__name__}, or {_path(moved)}")
    elif other := _NO_SUBCLASS.search(message):
        reason = f"not a subclass of {other[1]}: " if other[1] else "this is an abstract base class: "
    elif (bases := list(_bases(hint))) and re.fullmatch(r"[A-Z]\w*", value) and value != "None":
        near = [] if all(map(is_dataclass, bases)) else difflib.get_close_matches(value, _names(bases), n=1)
        reason = f"there is no {bases[0].__name__} of that name: {f'did you mean {near[0]}? Or ' if near else ''}"
    default = ", or leave it out for its default" if value == "None" else ""
    group = f"{'.'.join(keys)}."
    settings = [action.dest.removeprefix(group) for action in parser._actions if action.dest.startswith(group)]
    return Refused(keys, value, f"{reason}write {expected(hint, settings)}{default}")


def expected(hint: Any, settings: Sequence[str] = ()) -> str:
    """What may be written for a parameter with this type hint, or for a group of settings with these names."""
    origin, args = get_origin(hint), get_args(hint)
    if hint is Any and settings:
        return f"its settings ({', '.join(settings)})"
    if hint in _WORDS:
        return _WORDS[hint]
    if origin is type:
        return f"a subclass of {args[0].__name__}, as module.Class"
    if origin is Literal:
        return _either([str(value) for value in args])
    if origin in (Union, UnionType):
        own = {kind for kind in args if list(_bases(kind)) == [kind]}
        args = tuple(kind for kind in args if kind is not Tensor and (kind in own or not own & set(_bases(kind))))
        kinds = sorted(args, key=lambda kind: (kind is NoneType, bool(list(_bases(kind)))))
        return ", or ".join(dict.fromkeys(expected(kind) for kind in kinds))
    bases, container, of = list(_bases(hint)), "", ""
    if isinstance(origin, type) and issubclass(origin, Iterable):
        container, of = ("a mapping", " of names to ") if issubclass(origin, Mapping) else ("a list", " of ")
    if not bases:
        return container or str(hint)
    if all(is_dataclass(base) for base in bases):
        names = ", ".join(field.name for base in bases for field in fields(base))
        return f"{container}{of or 'its '}settings ({names})"
    return f"{container}{of}{_classes(bases)}"


def _classes(bases: list[type]) -> str:
    names = _names(bases)
    if names and (len(names) <= MANY or bases[0].__module__.partition(".")[0] == OURS):
        return f"{_either(names)}, or module.Class of your own"
    return f"a {bases[0].__name__}, as module.Class"


def _either(names: list[str]) -> str:
    return " or ".join(names) if len(names) < 3 else f"one of {', '.join(names)}"


def _bases(hint: Any) -> Iterator[type]:
    """The classes whose subclasses a type hint accepts: its own, or those of a container's values or a callable's
    result."""
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        for kind in args:
            yield from _bases(kind)
    elif origin is Callable or (isinstance(origin, type) and issubclass(origin, Iterable)):
        yield from _bases(args[0] if origin in (list, set, tuple) else args[-1])
    elif origin is None and isinstance(hint, type) and hint not in (*_WORDS, Tensor):
        yield hint


def _names(bases: list[type]) -> list[str]:
    """The concrete classes below ``bases`` that are public in the bases' package, or in ours."""
    found: set[str] = set()
    for base in bases:
        distributions = (base.__module__.partition(".")[0], OURS)
        for kind in _below(base):
            in_module = kind.__module__ == base.__module__ and not _is_exported(base) and kind.__name__[0] != "_"
            public = in_module or (_is_exported(kind) and kind.__module__.partition(".")[0] in distributions)
            offered = kind.__name__ not in NOT_OFFERED and not kind.__module__.startswith(DEMOS)
            if public and offered and not inspect.isabstract(kind):
                found.add(kind.__name__)
    return sorted(found)


def _owners(kind: type, name: str) -> list[str]:
    """The classes of ours that could be written in place of ``kind`` and have a setting of this name; none if these are
    many, as of a name that says little."""
    bases = [base for base in kind.__mro__[1:] if base.__module__.startswith(f"{OURS}.") and base.__subclasses__()]
    others = {other for base in bases for other in _below(base) if other.__module__.startswith(f"{OURS}.")}
    offered = (other for other in others if other.__name__ not in NOT_OFFERED and _is_exported(other))
    setting = name.partition(".")[0]
    names = sorted(other.__name__ for other in offered if setting in inspect.signature(other).parameters)
    return names if len(names) <= 3 else []


def _below(base: type) -> Iterator[type]:
    """All subclasses, or ``base`` itself if it has none."""
    subclasses: list[type] = base.__subclasses__()
    if not subclasses:
        yield base
    for kind in subclasses:
        yield kind
        yield from (below for below in _below(kind) if below is not kind)


def _moved(class_path: str, bases: Iterable[type]) -> type | None:
    """The class of ours that had this path in an earlier version."""
    package, _, name = class_path.rpartition(".")
    ours = [kind for base in bases for kind in _below(base) if kind.__module__.partition(".")[0] == OURS]
    return next((kind for kind in ours if kind.__name__ == name and package.startswith(OURS)), None)


def _path(kind: type) -> str:
    """The shortest import path: that of the outermost package that exports the class."""
    names = kind.__module__.split(".")
    packages = (".".join(names[:length]) for length in range(1, len(names)))
    exporting = (name for name in packages if getattr(sys.modules.get(name), kind.__name__, None) is kind)
    return f"{next(exporting, kind.__module__)}.{kind.__name__}"


def _is_exported(kind: type) -> bool:
    """Whether a package exports the class, not only the module that defines it."""
    return _path(kind) != f"{kind.__module__}.{kind.__name__}"


def _hint(parser: Any, name: str) -> Any:
    action: Action | None = next((action for action in parser._actions if action.dest == name), None)
    return getattr(action, "_typehint", None) or getattr(action, "type", None) or Any


def _keys(name: str) -> tuple[str, ...]:
    return tuple(key for key in name.split(".") if key not in ("init_args", "dict_kwargs"))


def _as_written(keys: tuple[str, ...], value: str | None) -> tuple[str, str | None]:
    """A setting's name and value as on the command line or in a recipe: with the keys and indices of mappings and
    lists, which the parser omits."""
    for name, given in _written():
        written = re.sub(r"\[\d+\]", "", name).split(".")
        rest = iter(written)
        if written[-1] == keys[-1] and all(key in rest for key in keys) and value in (None, MISSING, str(given)):
            return name, value or str(given)
    return ".".join(keys), value


def _written() -> Iterator[tuple[str, Any]]:
    flags = [part for whole in sys.argv[1:] for part in (whole.split("=", 1) if whole.startswith("--") else [whole])]
    for flag, value in pairwise([*flags, ""]):
        if flag.startswith("--"):
            name = ".".join(_keys(flag[2:]))
            yield name, value
            if value[:1] in ("[", "{"):
                with suppress(yaml.YAMLError):
                    yield from settings_in(yaml.safe_load(value), name)
    for path in _recipes():
        with suppress(yaml.YAMLError, OSError, UnicodeDecodeError):
            yield from settings_in(yaml.safe_load(path.read_text()))


def _recipes() -> Iterator[Path]:
    """The recipes that the command line names."""
    for argument in sys.argv[1:]:
        path = Path(argument.removeprefix("--config="))
        if path.suffix in (".yaml", ".yml") and path.is_file():
            yield path


def _not_yaml(problem: str) -> Refused:
    """A refusal that names the recipe with the ``problem``, which the parser does not know."""
    recipes = list(_recipes())
    unreadable = [path for path in recipes if not _is_yaml(path)] or recipes[-1:]
    name = str(unreadable[0]) if unreadable else "recipe"
    where = problem.replace('"<unicode string>"', name)
    return Refused(("config",), name, f"this is not YAML: {where}")


def _is_yaml(path: Path) -> bool:
    try:
        yaml.safe_load(path.read_text())
    except (yaml.YAMLError, OSError, UnicodeDecodeError):
        return False
    return True
