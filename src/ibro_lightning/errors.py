"""Errors that the user can act on: each names the setting, its value and the remedy."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from numbers import Integral
from pickle import UnpicklingError
from typing import SupportsFloat

NO_PLATEAU = (
    "it waits for a metric, and a schedule moves with every optimizer step here: write another one of "
    "torch.optim.lr_scheduler, such as CosineAnnealingLR"
)
"""Why ``ReduceLROnPlateau`` is refused."""


PICKLED = (
    "this file is a pickle that holds more than tensors, and to read it would run whatever code is in it: ask for a "
    "revision in safetensors, or have whoever made the file convert it"
)
"""Remedy for weights or checkpoints that torch refuses to unpickle; torch's own message tells how to bypass that."""


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """``error``, and the errors that led to it."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        yield error
        seen.add(id(error))
        error = error.__cause__ or error.__context__


def is_unpickling(error: BaseException | None) -> bool:
    """Whether ``error``, or an error that it wraps, is torch's refusal to unpickle a file."""
    return any(isinstance(e, UnpicklingError) or "Weights only load failed" in str(e) for e in causes(error))


_ON_CPU = re.compile(r"can't allocate memory|not enough memory|Cannot allocate memory|std::bad_alloc")
_LOST = re.compile(r"[Cc]onnection (?:closed|reset|was reset)|Broken pipe|remote process exited")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error means out of memory: on an accelerator, in torch on the CPU, or in Python."""
    if isinstance(error, MemoryError) or is_a(error, "OutOfMemoryError"):
        return True
    return isinstance(error, RuntimeError) and bool(_ON_CPU.search(str(error)))


def is_lost_connection(error: BaseException) -> bool:
    """Whether a collective failed because another process is gone."""
    return isinstance(error, RuntimeError) and not isinstance(error, RankError) and bool(_LOST.search(str(error)))


def is_a(error: BaseException, name: str) -> bool:
    """Whether an error is of the class of that name, of a library that need not be imported for this."""
    return any(kind.__name__ == name for kind in type(error).__mro__)


class UserError(Exception):
    """Base of all errors that the user can fix; never raised itself. The command line prints the message as one line,
    without a traceback, and exits with code 2."""


class ConfigError(UserError, ValueError):
    """An invalid field of a constructor: its name, its value and the remedy.

    The field's name is that of the constructor's parameter, dotted for a field of a nested object. Code that builds the
    object from a recipe sets :attr:`path`, so that the message names the setting as the user writes it there.

    >>> error = ConfigError("group_size", 1, "DAPO compares responses to one prompt: write 2 or more")
    >>> str(error)
    'group_size: 1 - DAPO compares responses to one prompt: write 2 or more'
    >>> error.path = "data"
    >>> str(error)
    'data.group_size: 1 - DAPO compares responses to one prompt: write 2 or more'
    """

    path: str = ""
    """Where the object is in the recipe, e.g. ``data.eval_sets.aime``; empty if it does not come from a recipe."""

    def __init__(self, field: str, value: object, remedy: str) -> None:
        self.field, self.value, self.remedy = field, value, remedy
        super().__init__(field, value, remedy)

    @property
    def setting(self) -> str:
        """The field's full name, path included."""
        return f"{self.path}.{self.field}" if self.path else self.field

    def __str__(self) -> str:
        return f"{self.setting}: {_short(self.value)} - {self.remedy}"

    def __reduce__(self) -> tuple[type[ConfigError], tuple[str, object, str]]:
        """Makes the error picklable, so that worker processes can raise it."""
        plain = self.value is None or isinstance(self.value, bool | int | float | str)
        return ConfigError, (self.setting, self.value if plain else str(self.value), self.remedy)


def is_number(value: object) -> bool:
    """Whether ``value`` is a number, NaN and infinity included: no text, and not True or False."""
    return isinstance(value, SupportsFloat) and not isinstance(value, bool | type)


def check_at_least(field: str, value: float, minimum: float, advice: str = "") -> None:
    """Raise a :class:`ConfigError` unless ``value`` is a finite number of at least ``minimum``."""
    if not (is_number(value) and math.isfinite(value) and value >= minimum):
        quoted = ", as a number without quotes" if isinstance(value, str) else ""
        raise ConfigError(field, value, f"write {minimum:g} or more{quoted}{advice}")


def check_count(field: str, value: object, minimum: int = 1, advice: str = "") -> None:
    """Raise a :class:`ConfigError` unless ``value`` is a whole number of at least ``minimum``."""
    if not isinstance(value, Integral) or isinstance(value, bool):
        raise ConfigError(field, value, f"write a whole number, {minimum} or more{advice}")
    check_at_least(field, int(value), minimum, advice)


def check_instance(field: str, value: object, kind: type, advice: str = "", *, optional: bool = False) -> None:
    """Raise a :class:`ConfigError` unless ``value`` is an object of a class, or None where that is ``optional``."""
    if not (isinstance(value, kind) or (optional and value is None)):
        raise ConfigError(field, value, f"write an instance of {kind.__name__}{', or None' * optional}{advice}")


def check_one_of(field: str, value: object, choices: Sequence[str]) -> None:
    """Raise a :class:`ConfigError` unless ``value`` is one of ``choices``."""
    if value not in choices:
        raise ConfigError(field, value, f"write one of {', '.join(choices)}")


class RewardError(UserError, RuntimeError):
    """A reward function raised, or returned something other than a finite number. Names the reward and the prompt."""


class HookError(UserError, ValueError):
    """A method of a class that users write returned what its caller cannot use. Names the class and the method, what it
    returned, and what to return instead."""


def wrong_return(owner: object, method: str, value: object, remedy: str, name: str | None = None) -> HookError:
    """The error for what a method of ``owner`` returned; ``name`` is that of the value in a mapping."""
    under = "" if name is None else f" as {name!r}"
    return HookError(f"{type(owner).__name__}.{method} returned {kind_of(value)}{under} - {remedy}")


def kind_of(value: object) -> str:
    """What a value is, in a few words: of a tensor its dtype and shape."""
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
    if isinstance(value, tuple | list) and len(value) < 5:
        inner = ", ".join(map(kind_of, value))
        return f"({inner})" if isinstance(value, tuple) else f"[{inner}]"
    if value is None or isinstance(value, bool | int | float):
        return str(value)
    if isinstance(value, type):
        return f"the class {value.__name__}"
    name = type(value).__name__
    return f"{'an' if name[0].lower() in 'aeiou' else 'a'} {name}"


class RolloutError(UserError, RuntimeError):
    """Generation cannot provide what the update needs, e.g. dynamic sampling found no informative group."""


class RankError(UserError, RuntimeError):
    """Another process of this run failed. Says which one and how; that process prints its own error."""


class WeightSyncError(RolloutError):
    """After a sync the engine's weights differ from the policy's. Says which ones, by how much, and why."""


def _short(value: object, limit: int = 200) -> str:
    text = repr(value) if isinstance(value, str) else str(value)
    text = " ".join(text.split())
    return text if len(text) <= limit else text[: limit - 1] + "…"
