"""Further columns of a dataset, available to rewards and hindsight templates in ``prompt.meta``."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping, Sequence
from datetime import date, time, timedelta
from decimal import Decimal
from typing import Any

from ibro_lightning.errors import ConfigError
from ibro_lightning.sources.files import Row, Table

SETTING = "meta_columns"


class MetaColumns:
    """Reads the columns ``names`` of each row, which are the keys of ``meta``; dots reach into nested ones."""

    def __init__(self, path: str, names: Sequence[str], table: Table) -> None:
        self.path = path
        self._keys = {name: [name] if name in table.columns else name.split(".") for name in names}
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
        raise ConfigError(
            SETTING,
            name,
            f"{self.path}, {row[0]}: a value of type {type(value).__name__} cannot be kept beside the responses: take "
            "this column out",
        )

    def _no_such(self, name: str, key: str, others: Sequence[str], before: str = "") -> ConfigError:
        near = difflib.get_close_matches(key, others, n=1)
        rest = name[len(before) + len(key) :]
        hint = f"did you mean {before + near[0] + rest!r}?" if near else f"write one of {[before + o for o in others]}"
        return ConfigError(SETTING, name, f"{self.path} has no such column: {hint}")


def checked_names(names: Sequence[str] | str | None) -> list[str]:
    """``names`` as a list; raises :class:`ConfigError` if one is empty or repeated."""
    columns = [names] if isinstance(names, str) else list(names or ())
    for name in columns:
        if not isinstance(name, str) or not name:
            raise ConfigError(SETTING, name, "name columns of the file")
        if columns.count(name) > 1:
            raise ConfigError(SETTING, name, "is there twice: name each column once")
    return columns
