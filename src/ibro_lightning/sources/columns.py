"""The question and answer columns of a dataset, with errors that name the file and row."""

from __future__ import annotations

import math
from collections.abc import Mapping
from decimal import Decimal
from typing import Any

from ibro_lightning.errors import ConfigError
from ibro_lightning.sources.files import Row, Table


class NothingThere(ConfigError):
    """A row without question or answer, which ``skip_bad_rows`` skips."""


class Column:
    """A question or answer column, possibly nested: the first of ``names`` that exists, otherwise ConfigError."""

    def __init__(self, setting: str, path: str, names: list[str] | str, table: Table) -> None:
        self.setting, self.path = setting, path
        candidates = [names] if isinstance(names, str) else list(names)
        found = next((name for name in candidates if _has(table, name, nested=len(candidates) > 1)), None)
        if found is None:
            remedy = f"{path} has no such column: write one of {sorted(table.columns)}"
            raise ConfigError(setting, names, remedy)
        self.name = found
        self.keys = _keys(table, found)
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
        """Raise :class:`NothingThere` if ``value`` is missing, blank or not finite."""
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
        return NothingThere(self.setting, self.name, f"{self.path}, {row[0]}: {what}: {remedy}")


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
    for types, name in (
        (str, "text"),
        (bool, "a truth value"),
        ((int, float, Decimal), "a number"),
        (list, "a list"),
        (Mapping, "an object"),
    ):
        if isinstance(value, types):
            return name
    return f"a value of type {type(value).__name__}"
