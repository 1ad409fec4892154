"""The parser's errors in one line: the setting as the user writes it, its value, and the remedy."""

from __future__ import annotations

import difflib
import re
from argparse import SUPPRESS, Action, ArgumentError
from collections.abc import Mapping
from dataclasses import is_dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from ibro_lightning.cli.offers import (
    bases_of,
    classes,
    either,
    expected,
    is_container,
    is_to_be_chosen,
    moved_to,
    names_below,
    offered,
    owners,
    path_of,
    settings_of,
)
from ibro_lightning.cli.written import ENTRY, MISSING, as_written, is_yaml, keys_of, named_recipes
from ibro_lightning.errors import NO_PLATEAU, ConfigError
from ibro_lightning.guards.trainer_flags import FLAGS, refuse_flags
from ibro_lightning.runs.recipes import recipe_names

_KEY = re.compile(r'(?:Parser key "|argument --)([\w.]+)')
_UNKNOWN = re.compile(r"ption '([\w.]+)' is not accepted|(?:Group '([\w.]+)'|') does not accept option '([\w.]+)'")
_COMMAND = re.compile(r"^Subcommand '(\w+)'|required: (\w+)\.")
_HELP = re.compile(r"--([\w.]+)\.help: .*: (\S+)$")
_UNRECOGNIZED = re.compile(r"unrecognized arguments: (-*)([^\s=]+)(?:(?:=|\s(?!--))(.*?))?(?: --|\n|$)")
_MISSING = re.compile(r"required: ([\w.]+)|argument --([\w.]+): expected")
_VALUE = re.compile(r"(?:Got value: |Given value: |path string: |load config ['\"])(.*?)['\"]?(?:\n|$)")
_NESTED = re.compile(r"NestedArg\(key='([\w.]+)', val='?(.*?)'?\)$")
_IMPORT = re.compile(r"Problem with given class_path '([^']+)':\s*(.*)", re.DOTALL)
_CLASS = re.compile(r"(?:given class_path '|Import path |class, but )([\w.]+)")
_NO_SUBCLASS = re.compile(r"does not correspond to a subclass of (\w+)|is abstract")
BAD_YAML = "Problems parsing config: "


class Refused(ArgumentError):
    """A setting that the parser of one class refuses: the path from that class to it, its value, None for null, and the
    class."""

    def __init__(self, keys: tuple[str, ...], value: str | None, remedy: str, kind: type | None = None) -> None:
        super().__init__(None, remedy)
        self.keys, self.value, self.remedy, self.kind = keys, value, remedy, kind

    def line(self) -> str:
        if not self.keys:
            return self.remedy
        key, value = as_written(self.keys, self.value, self.kind)
        if value in (None, "None", MISSING):
            return f"{key}: {'null - ' if value == 'None' else value or ''}{self.remedy}"
        return str(ConfigError(key, value, self.remedy))


def explain(parser: Any, message: str, cause: BaseException | None) -> Refused:
    """A parser's error as a :class:`Refused`. What the parser caught may wrap the one of a nested class's parser."""
    keys = keys_of(found[1]) if (found := _KEY.search(message)) else ()
    while cause is not None and not isinstance(cause, Refused):
        if isinstance(cause, ConfigError):
            return Refused((), None, str(cause))
        cause = cause.__cause__
    if cause is not None:
        return _of_part(_hint(parser, ".".join(keys)), keys, cause)
    if message.startswith(BAD_YAML):
        return _not_yaml(message.removeprefix(BAD_YAML))
    if (command := _COMMAND.search(message)) and parser._subcommands_action is not None:
        parser = parser._subcommands_action.choices[command[1] or command[2]]
    if of_class := _HELP.search(message):
        return _wrong_value(parser, keys_of(of_class[1]), of_class[2], message)
    if unknown := _UNKNOWN.search(message):
        return _unknown(parser, ".".join(filter(None, unknown.groups())), None)
    if unknown := _UNRECOGNIZED.search(message):
        dashes, name, value = unknown.groups()
        return _unknown(parser, name, value) if dashes else _stray(name)
    if missing := _MISSING.search(message):
        name = (missing[1] or missing[2]).removeprefix(f"{command[2]}." if command else "")
        if name in ("data", "model") and not any(True for _ in named_recipes()):
            return Refused(keys_of(name), MISSING, "write --config RECIPE, such as --config quickstart.yaml")
        return Refused(keys_of(name), MISSING, f"write {expected(_hint(parser, name))}", parser.of_class)
    values = _VALUE.findall(message) or _CLASS.findall(message)
    if not keys or not values:
        return Refused((), None, message)
    return _wrong_value(parser, keys, values[-1].strip(), message)


def _of_part(hint: Any, keys: tuple[str, ...], refused: Refused) -> Refused:
    """What the parser of a class refuses, as the parser around it says it, where that class is written as ``hint``."""
    remedy = refused.remedy
    base = next((kind for kind in bases_of(hint) if kind is refused.kind), None)
    if base is not None and is_to_be_chosen(base):  # the parser takes the base where no class is written
        remedy = f"it belongs to a class: write class_path first, {classes([base])}"
    entry = (ENTRY,) if is_container(hint) else ()
    return Refused((*keys, *entry, *refused.keys), refused.value, remedy, refused.kind)


def _unknown(parser: Any, name: str, value: str | None) -> Refused:
    """A setting that a class does not have, or the group of settings in it that the name begins with."""
    group = max((one for one in parser.groups if name.startswith(f"{one}.")), key=len, default="")
    of_parser = None if parser.exit_on_error else parser.of_class
    kind = getattr(parser.groups[group], "group_class", None) if group else of_parser
    known = {action.dest for action in parser._actions if action.dest not in ("help", "print_shtab", SUPPRESS)}
    within = f"{group}." if group else ""
    names = sorted(dest.removeprefix(within) for dest in known if dest.startswith(within))
    elsewhere = _in_classes(parser) if kind is None and not group else {}
    setting, near = _nearest(name.removeprefix(within), names, elsewhere)
    hint = f"did you mean {near}?" if near else f"it has {', '.join(one for one in names if '.' not in one) or 'none'}"
    if kind is not None and (others_have := owners(kind, setting)):
        hint = f"{either(others_have)} has it"
    owner = kind.__name__ if kind is not None else group or "the command line"
    value = value if setting == name.removeprefix(within) else None
    return Refused(keys_of(within + setting), value, f"{owner} has no such setting: {hint}", kind)


def _nearest(name: str, names: list[str], elsewhere: Mapping[str, str]) -> tuple[str, str | None]:
    """The part of an unknown setting's name that is wrong, and the most similar of ``names``, if any is, or of those
    that are ``elsewhere``: name → whole name."""
    group, dot, rest = name.partition(".")
    if group in elsewhere:
        return name, f"{elsewhere[group]}{dot}{rest}"
    groups = {one.partition(".")[0] for one in names}
    if not rest or group in groups:
        near = next(iter(difflib.get_close_matches(name, [*names, *elsewhere], n=1)), None)
        return name, elsewhere.get(near, near) if near else None
    renamed = next(iter(difflib.get_close_matches(group, groups, n=1)), None)
    whole = f"{renamed}.{rest}"
    return (name, whole) if whole in names else (group, renamed)


def _in_classes(parser: Any) -> dict[str, str]:
    """The settings of the classes that ``model`` and ``data`` may be, with their whole names."""
    parts = ((dest, kind) for dest in ("data", "model") for kind in offered(bases_of(_hint(parser, dest))))
    return {setting: f"{dest}.{setting}" for dest, kind in parts for setting in settings_of(kind)}


def _stray(word: str) -> Refused:
    """A word that is no setting's value."""
    if {word, f"{word}.yaml"} & {*recipe_names()} or Path(word).suffix in (".yaml", ".yml"):
        return Refused(("config",), word, f"a recipe has a flag before it: write --config {word}")
    return Refused(("argument",), word, "it is no setting's value: settings are written --NAME VALUE")


def _wrong_value(parser: Any, keys: tuple[str, ...], value: str, message: str) -> Refused:
    hint = _hint(parser, ".".join(keys))
    if "subclasses with name ReduceLROnPlateau" in message:
        return Refused(keys, "ReduceLROnPlateau", NO_PLATEAU)
    if parser.exit_on_error and (remedy := _refused_flag(keys, value)):
        return Refused(keys, value, remedy)
    if nested := _NESTED.match(value):
        inner, value = nested[1], nested[2]
        if "is abstract" in message:
            remedy = f"it belongs to a class: write {keys[-1]} as {classes(list(bases_of(hint)))} first"
            return Refused((*keys, *keys_of(inner)), value, remedy)
    reason = ""
    if problem := _IMPORT.search(message):
        value, cause = problem[1], problem[2].splitlines()[0].strip()
        reason = f"cannot be imported ({cause}): "
        if (moved := moved_to(value, bases_of(hint))) is not None and path_of(moved) == value:
            return Refused(keys, value, f"one of its settings: {cause}")
        if moved is not None:
            return Refused(keys, value, f"this class has moved: write {moved.__name__}, or {path_of(moved)}")
    elif other := _NO_SUBCLASS.search(message):
        reason = f"not a subclass of {other[1]}: " if other[1] else "this is an abstract base class: "
    elif (bases := list(bases_of(hint))) and re.fullmatch(r"[A-Z]\w*", value) and value != "None":
        near = [] if all(map(is_dataclass, bases)) else _similar_class(value, names_below(bases))
        reason = f"there is no {bases[0].__name__} of that name: {f'did you mean {near[0]}? Or ' if near else ''}"
    default = ", or leave it out for its default" if value == "None" else ""
    group = f"{'.'.join(keys)}."
    settings = [action.dest.removeprefix(group) for action in parser._actions if action.dest.startswith(group)]
    return Refused(keys, value, f"{reason}write {expected(hint, settings)}{default}")


def _similar_class(name: str, names: list[str]) -> list[str]:
    """The most similar of the classes' names, or else the first that begins so."""
    return difflib.get_close_matches(name, names, n=1) or [one for one in names if one.startswith(name)][:1]


def _refused_flag(keys: tuple[str, ...], value: str) -> str | None:
    """What to write in place of a flag of the Trainer, if what Lightning takes there is refused here."""
    if keys[:-1] != ("trainer",) or keys[-1] not in FLAGS:
        return None
    try:
        refuse_flags(SimpleNamespace(**dict.fromkeys(FLAGS) | {keys[-1]: value}))
    except ConfigError as refused:
        return refused.remedy
    return None


def _hint(parser: Any, name: str) -> Any:
    commands = parser._subcommands_action.choices.values() if parser._subcommands_action is not None else ()
    actions = (action for one in (parser, *commands) for action in one._actions)
    action: Action | None = next((action for action in actions if action.dest == name), None)
    return getattr(action, "_typehint", None) or getattr(action, "type", None) or Any


def _not_yaml(problem: str) -> Refused:
    """A refusal that names the recipe with the ``problem``, which the parser does not know."""
    recipes = list(named_recipes())
    unreadable = [path for path in recipes if not is_yaml(path)] or recipes[-1:]
    name = str(unreadable[0]) if unreadable else "recipe"
    where = problem.replace('"<unicode string>"', name)
    return Refused(("config",), name, f"this is not YAML: {where}")
