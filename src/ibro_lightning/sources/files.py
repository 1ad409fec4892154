"""Tables of rows from local files and the hub; every error names the file and the position in it.

JSON and CSV are not read by ``datasets``, whose errors name neither line nor column and which guesses types (the answer
"033" of a CSV file becomes 33, "None" a missing value).
"""

from __future__ import annotations

import csv
import io
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq

from ibro_lightning.errors import ConfigError
from ibro_lightning.sources.json_columns import json_columns, rows_of

Row = tuple[str, Mapping[str, Any]]
"""``(position, values)``; the position is "line 7" in JSON lines and "data row 7" elsewhere, counted from 1."""
_BATCH_ROWS = 1000


class Table(ABC):
    """A sequence of rows that can be iterated repeatedly."""

    columns: Sequence[str]
    json_columns: frozenset[str] = frozenset()
    """Columns of mixed types, stored as JSON text; see :mod:`.json_columns`."""
    fields: Sequence[str] = ()
    """Keys at which a file of one object has lists, which may be its rows."""

    @abstractmethod
    def __len__(self) -> int:
        """Number of rows."""

    @abstractmethod
    def rows(self, columns: Sequence[str]) -> Iterator[Row]:
        """All rows, in order, with at least those of ``columns`` that a row has."""


class TextTable(Table):
    """A ``.jsonl``, ``.json`` or ``.csv`` file, in memory."""

    def __init__(self, path: str, field: str | None = None) -> None:
        data = Path(path).read_bytes()
        read: Callable[[str, str], Iterator[Row]] = partial(_read_json, field=field)
        if (suffix := Path(path).suffix.lower()) != ".json":
            read = {".jsonl": _read_json_lines, ".csv": _read_csv}[suffix]
        try:
            text = data.decode("utf-8").removeprefix("\ufeff")
        except UnicodeDecodeError as error:
            raise _not_utf8(path, data, error, read) from error
        self._rows = list(read(path, text))
        self.columns = list(dict.fromkeys(name for _, values in self._rows for name in values))
        if len(self._rows) == 1 and field is None and suffix == ".json":
            self.fields = [name for name, value in self._rows[0][1].items() if isinstance(value, list)]

    def __len__(self) -> int:
        return len(self._rows)

    def rows(self, columns: Sequence[str]) -> Iterator[Row]:
        return iter(self._rows)


class ParquetTable(Table):
    """A ``.parquet`` file, read in batches, since published files can decompress to gigabytes."""

    def __init__(self, path: str) -> None:
        self.path = path
        size = Path(path).stat().st_size
        with Path(path).open("rb") as file:
            head = file.read(4)
            file.seek(max(0, size - 4))
            tail = file.read()
        if head != b"PAR1":
            raise _unreadable(path, 'it does not begin with "PAR1": this is no parquet file')
        if tail != b"PAR1" or size < 12:
            reason = f'truncated: its {size} bytes do not end with "PAR1", so the footer that locates rows and columns'
            raise _unreadable(path, f"{reason} is missing: copy the file again")
        try:
            with pq.ParquetFile(path) as parquet:
                self.columns, self._size = parquet.schema_arrow.names, parquet.metadata.num_rows
                self.json_columns = json_columns(parquet.schema_arrow)
        except Exception as error:
            raise _unreadable(path, f"its footer is damaged ({_reason(error)}): copy the file again") from error

    def __len__(self) -> int:
        return self._size

    def rows(self, columns: Sequence[str]) -> Iterator[Row]:
        number = 0
        try:
            with pq.ParquetFile(self.path) as parquet:
                for batch in parquet.iter_batches(_BATCH_ROWS, columns=list(columns), use_threads=False):
                    _check_utf8(self.path, batch, number)
                    for number, values in enumerate(rows_of(batch), start=number + 1):  # noqa: B020  continues
                        yield f"data row {number}", values
        except ConfigError:
            raise
        except Exception as error:
            names = ", ".join(columns)
            reason = f"damaged after data row {number}, in column {names} ({_reason(error)}): copy the file again"
            raise _unreadable(self.path, reason) from error


class HubTable(Table):
    """A dataset on the hub, or a folder that ``datasets`` can load; ``split`` may be a slice."""

    def __init__(self, path: str, config: str | None, split: str) -> None:
        try:
            self._data = datasets.load_dataset(path, config, split=split)
        except Exception as error:  # datasets also passes on errors of pyarrow, pandas and the hub
            reason = f"{_reason(error.__cause__ or error)} - check name, config and split, and the network"
            raise _unreadable(path, reason) from error
        self.columns = self._data.column_names
        self.json_columns = json_columns(self._data.data.schema)

    def __len__(self) -> int:
        return len(self._data)

    def rows(self, columns: Sequence[str]) -> Iterator[Row]:
        number = 0
        # As Arrow, because the decoding of datasets does not distinguish 7 from "007".
        for batch in self._data.select_columns(list(columns)).with_format("arrow").iter(_BATCH_ROWS):
            for values in rows_of(batch):
                number += 1
                yield f"data row {number}", values


def open_table(path: str, config: str | None, split: str, field: str | None = None) -> tuple[Table, list[range]]:
    """``(table, row ranges that split selects)``; raises :class:`ConfigError`. A local file accepts any split name.

    ``field``: the key of the rows in a ``.json`` file that is one object; nothing else has one.
    """
    suffix = Path(path).suffix.lower()
    if suffix not in (".jsonl", ".json", ".csv", ".parquet"):
        if Path(path).is_file():
            raise ConfigError("path", path, "write a .jsonl, .json, .csv or .parquet file")
        table: Table = HubTable(path, config, split)
        return table, [range(len(table))]
    if not Path(path).is_file():
        raise ConfigError("path", path, "no such file: check the path (it is relative to where you run)")
    if Path(path).stat().st_size == 0:
        raise ConfigError("path", path, "this file is empty: it must hold at least one row")
    table = ParquetTable(path) if suffix == ".parquet" else TextTable(path, field)
    if not len(table):
        raise ConfigError("path", path, "this file is empty: it has no rows, and must hold at least one")
    name = split.split("[")[0]  # "train[:10]" is the first ten rows of "train"
    try:
        parts = datasets.ReadInstruction.from_spec(split).to_absolute({name: len(table)})
    except (ValueError, AssertionError) as error:
        raise ConfigError("split", split, f"write {name}, or a slice such as {name}[:10]") from error
    return table, [range(part.from_, part.to) for part in parts]


def _read_json_lines(path: str, text: str) -> Iterator[Row]:
    lines = text.split("\n")  # splitlines would split at U+2028, which JSON strings may contain
    for number, line in enumerate(lines, start=1):
        if line.strip():
            yield f"line {number}", _object(path, f"line {number}", _parse(path, line, number))


def _read_json(path: str, text: str, field: str | None = None) -> Iterator[Row]:
    """Read a list of objects, or JSON lines: on the hub, ``.json`` files contain either. Of one object, read the list
    at ``field``, or the object itself as the only row."""
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        if error.msg != "Extra data":
            raise _broken_json(path, error, error.lineno) from error
        yield from _read_json_lines(path, text)
        return
    except (ValueError, RecursionError) as error:
        raise _unreadable(path, _reason(error)) from error
    if field is not None and isinstance(content, dict):
        content = _rows_at(path, content, field)
    for number, values in enumerate(content if isinstance(content, list) else [content], start=1):
        yield f"data row {number}", _object(path, f"data row {number}", values)


def _rows_at(path: str, content: Mapping[str, Any], field: str) -> list[Any]:
    """The list at ``field`` of a file's only object; dots reach deeper."""
    rows: Any = content
    for key in [field] if field in content else field.split("."):
        rows = rows.get(key) if isinstance(rows, Mapping) else None
    if not isinstance(rows, list):
        lists = [name for name, value in content.items() if isinstance(value, list)]
        remedy = f"write {' or '.join(lists)}" if lists else "write null: the file holds one row"
        raise ConfigError("field", field, f"{path} has no list of rows there: {remedy}")
    return rows


def _read_csv(path: str, text: str) -> Iterator[Row]:
    csv.field_size_limit(max(csv.field_size_limit(), len(text)))  # prompts may exceed the default
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        header = next(reader, [])
        if repeated := sorted({name for name in header if header.count(name) > 1}):
            raise _unreadable(path, f"line 1: several columns are called {repeated[0]!r}: rename all but one")
        rows = (fields for fields in reader if fields)
        for number, fields in enumerate(rows, start=1):
            if len(fields) != len(header):
                counts = f"has {len(fields)} fields, the header {len(header)} ({', '.join(header)[:100]})"
                remedy = 'put fields that contain commas in "quotes"'
                raise _unreadable(path, f"data row {number} (line {reader.line_num}) {counts}: {remedy}")
            yield f"data row {number}", dict(zip(header, fields, strict=True))
    except csv.Error as error:
        raise _unreadable(path, f"line {reader.line_num}: {error}: check its quotes") from error


def _check_utf8(path: str, batch: pa.RecordBatch, before: int) -> None:
    """Raise :class:`ConfigError` for invalid UTF-8, which Parquet forbids but some writers produce."""
    for name, column in zip(batch.schema.names, batch.columns, strict=True):
        try:
            column.validate(full=True)
        except pa.ArrowInvalid:
            for row in range(len(column)):
                try:
                    column[row].as_py()
                except UnicodeDecodeError as error:
                    reason = f"data row {before + row + 1}, column {name!r}: not UTF-8: convert the file"
                    raise _unreadable(path, reason) from error


def _parse(path: str, line: str, number: int) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise _broken_json(path, error, number) from error
    except (ValueError, RecursionError) as error:  # huge integers, deep nesting
        raise _unreadable(path, f"line {number}: {_reason(error)}") from error


def _object(path: str, where: str, values: Any) -> Mapping[str, Any]:
    if not isinstance(values, dict):
        raise _unreadable(path, f'{where} is no object: write {{"problem": …, "answer": …}}')
    return values


def _broken_json(path: str, error: json.JSONDecodeError, line: int) -> ConfigError:
    hint = ", it ends too early" if not error.doc[error.pos :].strip() or "Unterminated" in error.msg else ""
    return _unreadable(path, f"line {line}, character {error.colno}: {error.msg}{hint}")


def _not_utf8(path: str, data: bytes, error: UnicodeDecodeError, read: Any) -> ConfigError:
    line = data.count(b"\n", 0, error.start) + 1
    byte = error.start - (data.rfind(b"\n", 0, error.start) + 1) + 1
    try:  # invalid bytes become lone surrogates, which identify the column
        rows = read(path, data.decode("utf-8", "surrogateescape").removeprefix("\ufeff"))
        column = next(f", column {name!r}" for _, row in rows for name in row if _holds_surrogate(row[name]))
    except (ConfigError, StopIteration):
        column = ""
    where = f"line {line}{column}: byte {byte} of the line (0x{data[error.start]:02x})"
    return _unreadable(path, f"{where} is not UTF-8: convert the file")


def _holds_surrogate(value: Any) -> bool:
    return any("\udc80" <= character <= "\udcff" for character in json.dumps(value, ensure_ascii=False))


def _unreadable(path: str, reason: str) -> ConfigError:
    return ConfigError("path", path, f"cannot be read: {reason}")


def _reason(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
