"""What may be written for a setting, in words: its choices by name, its kind of value, its own settings."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from datetime import timedelta
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

from torch import Tensor

from ibro_lightning.models import PolicySource
from ibro_lightning.models.policy_like import FOLDER, PolicyLike

OURS = "ibro_lightning"
BASES = ("PolicyLossMethod", "PolicyModule")
NOT_OFFERED = (*BASES, "CorrectPathEntropySuppression", "ReduceLROnPlateau", "ModelPolicy", "GoldTrial")
"""Bases, a former name, what is refused, what holds a model in memory, and what the pool builds: no message and no help
names them among those to choose from."""
DEMOS = "lightning.pytorch.demos"
"""Lightning's examples, known once somebody imports them."""
MANY = 16
"""Above this number, classes of other packages are not listed."""
_WORDS: dict[Any, str] = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
_WORDS |= {
    NoneType: "null",
    Path: "a path",
    timedelta: "a time, such as 00:30:00",
    Any: "another value",
    FOLDER: FOLDER,
}
POLICY = frozenset(get_args(PolicyLike))


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
        return either([str(value) for value in args])
    if origin in (Union, UnionType):
        if set(args) >= POLICY:  # a model in memory cannot be written
            args = (FOLDER, PolicySource, *(kind for kind in args if kind not in POLICY))
        own = {kind for kind in args if list(bases_of(kind)) == [kind]}
        args = tuple(kind for kind in args if kind is not Tensor and (kind in own or not own & set(bases_of(kind))))
        kinds = sorted(args, key=lambda kind: (kind is NoneType, bool(list(bases_of(kind)))))
        return ", or ".join(dict.fromkeys(expected(kind) for kind in kinds))
    bases, container, of = list(bases_of(hint)), "", ""
    if isinstance(origin, type) and issubclass(origin, Iterable):
        container, of = ("a mapping", " of names to ") if issubclass(origin, Mapping) else ("a list", " of ")
    if not bases:
        return container or str(hint)
    if all(is_dataclass(base) for base in bases):
        names = ", ".join(field.name for base in bases for field in fields(base))
        return f"{container}{of or 'its '}settings ({names})"
    return f"{container}{of}{classes(bases)}"


def classes(bases: list[type]) -> str:
    names = names_below(bases)
    if names and (len(names) <= MANY or bases[0].__module__.partition(".")[0] == OURS):
        return f"{either(names)}, or module.Class of your own"
    return f"a {bases[0].__name__}, as module.Class"


def either(names: list[str]) -> str:
    return " or ".join(names) if len(names) < 3 else f"one of {', '.join(names)}"


def bases_of(hint: Any) -> Iterator[type]:
    """The classes whose subclasses a type hint accepts: its own, or those of a container's values or a callable's
    result."""
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        for kind in args:
            yield from bases_of(kind)
    elif origin is Callable or (isinstance(origin, type) and issubclass(origin, Iterable)):
        yield from bases_of(args[0] if origin in (list, set, tuple) else args[-1])
    elif origin is None and isinstance(hint, type) and hint not in (*_WORDS, Tensor):
        yield hint


def names_below(bases: Iterable[type]) -> list[str]:
    """The names of those that are offered."""
    return sorted({kind.__name__ for kind in offered(bases)})


def offered(bases: Iterable[type]) -> set[type]:
    """The concrete classes below ``bases`` that are public in the bases' package, or in ours."""
    found: set[type] = set()
    for base in bases:
        distributions = (base.__module__.partition(".")[0], OURS)
        for kind in _below(base):
            in_module = kind.__module__ == base.__module__ and not _is_exported(base) and kind.__name__[0] != "_"
            public = in_module or (_is_exported(kind) and kind.__module__.partition(".")[0] in distributions)
            refused = kind.__name__ in NOT_OFFERED or kind.__module__.startswith(DEMOS)
            if public and not refused and not inspect.isabstract(kind):
                found.add(kind)
    return found


def owners(kind: type, name: str) -> list[str]:
    """The classes of ours that could be written in place of ``kind`` and have a setting of this name; none if these are
    many, as of a name that says little."""
    bases = [base for base in kind.__mro__[1:] if base.__module__.startswith(f"{OURS}.") and base.__subclasses__()]
    others = {other for base in bases for other in _below(base) if other.__module__.startswith(f"{OURS}.")} - {kind}
    offered = (other for other in others if other.__name__ not in NOT_OFFERED and _is_exported(other))
    setting = name.partition(".")[0]
    names = sorted(other.__name__ for other in offered if setting in settings_of(other))
    return names if len(names) <= 3 else []


def is_to_be_chosen(base: type) -> bool:
    """Whether a class has subclasses and no settings of its own, so that settings belong to one of those."""
    return bool(base.__subclasses__()) and not settings_of(base)


def settings_of(kind: type) -> list[str]:
    """The names of a constructor's parameters."""
    parameters = inspect.signature(kind).parameters.values()
    return [one.name for one in parameters if one.kind not in (one.VAR_POSITIONAL, one.VAR_KEYWORD)]


def is_container(hint: Any) -> bool:
    """Whether a list or mapping of other things may be written."""
    if get_origin(hint) in (Union, UnionType):
        return any(map(is_container, get_args(hint)))
    return isinstance(origin := get_origin(hint), type) and issubclass(origin, Iterable)


def _below(base: type) -> Iterator[type]:
    """All subclasses, or ``base`` itself if it has none."""
    subclasses: list[type] = base.__subclasses__()
    if not subclasses:
        yield base
    for kind in subclasses:
        yield kind
        yield from (below for below in _below(kind) if below is not kind)


def moved_to(class_path: str, bases: Iterable[type]) -> type | None:
    """The class of ours that had this path in an earlier version."""
    package, _, name = class_path.rpartition(".")
    ours = [kind for base in bases for kind in _below(base) if kind.__module__.partition(".")[0] == OURS]
    return next((kind for kind in ours if kind.__name__ == name and package.startswith(OURS)), None)


def path_of(kind: type) -> str:
    """The shortest import path: that of the outermost package that exports the class."""
    names = kind.__module__.split(".")
    packages = (".".join(names[:length]) for length in range(1, len(names)))
    exporting = (name for name in packages if getattr(sys.modules.get(name), kind.__name__, None) is kind)
    return f"{next(exporting, kind.__module__)}.{kind.__name__}"


def _is_exported(kind: type) -> bool:
    """Whether a package exports the class, not only the module that defines it."""
    return path_of(kind) != f"{kind.__module__}.{kind.__name__}"
