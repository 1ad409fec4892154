"""The columns of a dataset, with errors that name the file and row."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping, Sequence
from datetime import date, time, timedelta
from decimal import Decimal
from typing import Any

from ibro_lightning.errors import ConfigError
from ibro_lightning.rewards.mathematics.gold_text import canonical_gold
from ibro_lightning.sources.files import Row, Table


class MissingValue(ConfigError):
    """A row without question or answer, which ``skip_bad_rows`` skips."""


class Column:
    """A question or answer column, possibly nested: the first of ``names`` that exists, otherwise ConfigError."""

    def __init__(self, setting: str, path: str, names: list[str] | str, table: Table) -> None:
        self.setting, self.path = setting, path
        candidates = [names] if isinstance(names, str) else list(names)
        found = next((name for name in candidates if _has(table, name, nested=len(candidates) > 1)), None)
        if found is None:
            remedy = f"write one of {sorted(table.columns)}"
            if table.fields:
                remedy += f", or field: {table.fields[0]} if the rows are in that list"
            raise ConfigError(setting, names, f"{path} has no such column: {remedy}")
        self.name, self.keys = found, _keys(table, found)
        self.top = self.keys[0]
        self.is_json = self.top in table.json_columns
        self._first: tuple[str, str, str] | None = None

    def value(self, row: Row) -> Any:
        value: Any = row[1]
        for key in self.keys:
            value = value.get(key) if isinstance(value, Mapping) else None
        self.check_value(value, row)
        self._check_type(value, row)
        return value

    def check_value(self, value: Any, row: Row) -> None:
        """Raise :class:`MissingValue` if ``value`` is missing, blank or not finite."""
        if value is None or value in ("", [], {}) or (isinstance(value, str) and not value.strip()):
            raise self.nothing(row, "no value there")
        if isinstance(value, float | Decimal) and not math.isfinite(value):
            raise self.nothing(row, f"{value} is no value")

    def _check_type(self, value: Any, row: Row) -> None:
        # Published files mix 27 and "27.0", and single answers with lists: among answers these count as one type.
        answers = self.setting == "answer_column"
        is_bool = isinstance(value, bool) and not self.is_json  # in arrow.json it may be the text "true"
        kind = "a plain value" if answers and (is_plain(value) or is_bool) else kind_of(value)
        listed = answers and isinstance(value, list) and all(map(is_plain, value))
        like = "answer" if listed or kind == "a plain value" else kind
        if self._first is None:
            self._first = row[0], kind, like
        if like != self._first[2]:
            where, first, _ = self._first
            note = " (in arrow.json, the texts true and [1,2] look like values)" if self.is_json else ""
            raise self.error(row, f"{kind} here, but {first} in {where}: types must not be mixed in a column{note}")
        if isinstance(value, str) and any("\ud800" <= character <= "\udfff" for character in value):
            raise self.error(row, "it holds half a surrogate pair, which is not Unicode text: repair the row")

    def error(self, row: Row, what: str) -> ConfigError:
        return ConfigError(self.setting, self.name, f"{self.path}, {row[0]}: {what}")

    def nothing(self, row: Row, what: str) -> ConfigError:
        remedy = "repair the row, or write skip_bad_rows: true"
        return MissingValue(self.setting, self.name, f"{self.path}, {row[0]}: {what}: {remedy}")


def _keys(table: Table, name: str) -> list[str]:
    return [name] if name in table.columns else name.split(".")


def _has(table: Table, name: str, nested: bool) -> bool:
    """Whether the file has this column. With ``nested``, a dotted name must also exist in the first row."""
    top, *below = _keys(table, name)
    if top not in table.columns or not below or not nested:
        return top in table.columns
    _, value = next(table.rows([top]))
    for key in (top, *below):
        if not isinstance(value, Mapping) or key not in value:
            return False
        value = value[key]
    return True


def is_plain(value: Any) -> bool:
    """Whether ``value`` is text or a number; bools are not."""
    return isinstance(value, str | int | float | Decimal) and not isinstance(value, bool)


def is_number(value: Any) -> bool:
    return is_plain(value) and not isinstance(value, str)


def kind_of(value: Any) -> str:
    kinds = {str: "text", bool: "a truth value", int: "a number", float: "a number", Decimal: "a number"}
    kinds |= {list: "a list", Mapping: "an object"}
    found = (name for kind, name in kinds.items() if isinstance(value, kind))
    return next(found, f"a value of type {type(value).__name__}")


class MetaColumns:
    """Reads the columns ``names`` of each row, which are the keys of ``meta``; dots reach into nested ones."""

    def __init__(self, path: str, names: Sequence[str], table: Table) -> None:
        self.path = path
        self._keys = {name: _keys(table, name) for name in names}
        self._missing: dict[str, set[str]] = {name: set() for name in names}
        """Names not found in any row so far, with the keys found at their level."""
        for name, (top, *_) in self._keys.items():
            if top not in table.columns:
                raise self._no_such(name, top, table.columns)

    @property
    def tops(self) -> list[str]:
        """The top-level columns to read."""
        return [keys[0] for keys in self._keys.values()]

    def values(self, row: Row) -> dict[str, Any]:
        """The row's values by name, as plain JSON; None for missing ones."""
        return {name: self._plain(name, self._find(name, row), row) for name in self._keys}

    def check_found(self) -> None:
        """Raise :class:`ConfigError` for a nested name not found in any row."""
        for name, others in self._missing.items():
            *_, last = self._keys[name]
            raise self._no_such(name, last, sorted(others), name.removesuffix(last))

    def _find(self, name: str, row: Row) -> Any:
        value: Any = row[1]
        for number, key in enumerate(self._keys[name]):
            if not isinstance(value, Mapping) or (number and key not in value):
                if isinstance(value, Mapping) and name in self._missing:
                    self._missing[name] |= {str(other) for other in value}
                return None
            value = value.get(key)
        self._missing.pop(name, None)
        return value

    def _plain(self, name: str, value: Any, row: Row) -> Any:
        if value is None or isinstance(value, bool | int | str):
            return value
        if isinstance(value, float | Decimal):
            return float(value) if math.isfinite(value) else None  # NaN marks a missing value
        if isinstance(value, Mapping):
            return {str(key): self._plain(name, item, row) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [self._plain(name, item, row) for item in value]
        if isinstance(value, date | time):
            return value.isoformat()
        if isinstance(value, timedelta):
            return value.total_seconds()
        remedy = f"a value of type {type(value).__name__} cannot be kept beside the responses: take this column out"
        raise ConfigError("meta_columns", name, f"{self.path}, {row[0]}: {remedy}")

    def _no_such(self, name: str, key: str, others: Sequence[str], before: str = "") -> ConfigError:
        near = difflib.get_close_matches(key, others, n=1)
        rest = name[len(before) + len(key) :]
        hint = f"did you mean {before + near[0] + rest!r}?" if near else f"write one of {[before + o for o in others]}"
        return ConfigError("meta_columns", name, f"{self.path} has no such column: {hint}")


def checked_names(names: Sequence[str] | str | None) -> list[str]:
    """``names`` as a list; raises :class:`ConfigError` if one is empty or repeated."""
    columns = [names] if isinstance(names, str) else list(names or ())
    for name in columns:
        if not isinstance(name, str) or not name:
            raise ConfigError("meta_columns", name, "name columns of the file")
        if columns.count(name) > 1:
            raise ConfigError("meta_columns", name, "appears twice: name each column once")
    return columns


def word_key(value: Any) -> str:
    """The text by which ``answer_words`` names an answer: true and false as JSON writes them, 1.0 as 1."""
    if isinstance(value, bool):
        return "true" if value else "false"
    return canonical_gold(value) if is_number(value) else str(value).strip()


def checked_words(words: Mapping[Any, Any] | None) -> dict[str, str] | None:
    """``answer_words`` by :func:`word_key`; raises :class:`ConfigError` for what is not a word."""
    if words is None:
        return None
    example = 'such as {true: "yes", false: "no"}'
    if not isinstance(words, Mapping) or not words:
        raise ConfigError("answer_words", words, f"write a word for each answer, {example}, or null")
    for word in words.values():
        if not isinstance(word, str) or not word.strip():  # YAML reads yes and no as truth values
            raise ConfigError("answer_words", words, f"{word!r} is no text: write the words in quotes, {example}")
    return {word_key(key): word for key, word in words.items()}
