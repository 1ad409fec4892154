"""Decoding of ``arrow.json`` columns, in which ``datasets`` stores columns of mixed types.

pyarrow returns such values as JSON text (``"forty"`` with quotes, backslashes doubled). ``datasets`` stores text that
is itself valid JSON unquoted and decodes it on reading, so that "007" becomes 7 and "null" None. Here the spelling
decides between text and value.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from typing import Any

import pyarrow as pa

Decode = Callable[[Any], Any]
_NAME = b"ARROW:extension:name"
_NUMBERS = re.compile(r"\[[-+0-9.eE,\s]*\]")


def json_value(text: str, *, null_is_text: bool = False) -> Any:
    """The value of a cell of a JSON column.

    Numbers and lists in a spelling that no JSON writer produces are text: ``007``, ``1e5``, ``1.50``, ``[1, 2]``.

    With ``null_is_text``, so is ``null``, as in files of ``datasets``, where missing values are Arrow nulls.

    >>> [json_value(text) for text in ('"forty"', "12", "007", "1e5", "1.50", "[1, 2]", '["1",2]')]
    ['forty', 12, '007', '1e5', '1.50', '[1, 2]', ['1', 2]]
    """
    try:
        value = json.loads(text, parse_constant=_reject_constant)
    except (ValueError, RecursionError):
        return text
    if value is None:
        return text if null_is_text else None
    if isinstance(value, bool | str):
        return value
    if isinstance(value, int | float) and json.dumps(value) != text:
        return text
    if isinstance(value, list) and _NUMBERS.fullmatch(text) and json.dumps(value, separators=(",", ":")) != text:
        return text
    return value


def _reject_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON")


def rows_of(batch: pa.RecordBatch | pa.Table) -> list[dict[str, Any]]:
    """The rows of a batch, as from ``to_pylist``, with JSON columns decoded at any depth."""
    null_is_text = b"huggingface" in (batch.schema.metadata or {})
    decoders = {field.name: decode for field in batch.schema if (decode := _decoder(field, null_is_text))}
    rows: list[dict[str, Any]] = batch.to_pylist()
    for row in rows if decoders else ():
        for name, decode in decoders.items():
            row[name] = decode(row[name])
    return rows


def json_columns(schema: pa.Schema) -> frozenset[str]:
    """The columns that contain JSON text at any depth."""
    return frozenset(field.name for field in schema if _decoder(field, False))


def _decoder(field: pa.Field, null_is_text: bool) -> Decode | None:
    """The function that decodes a field's values; None if they need no decoding."""
    decode = _decoder_of(field.type, null_is_text)
    if decode is None and (field.metadata or {}).get(_NAME) == b"arrow.json":  # unknown to older pyarrow
        decode = _json_decoder(null_is_text)
    return decode


def _json_decoder(null_is_text: bool) -> Decode:
    def decode(text: Any) -> Any:
        return json_value(text, null_is_text=null_is_text) if isinstance(text, str) else text

    return decode


def _decoder_of(kind: pa.DataType, null_is_text: bool) -> Decode | None:
    if getattr(kind, "extension_name", None) == "arrow.json":
        return _json_decoder(null_is_text)
    if isinstance(kind, pa.BaseExtensionType):
        return _decoder_of(kind.storage_type, null_is_text)
    if pa.types.is_dictionary(kind):
        return _decoder_of(kind.value_type, null_is_text)
    if pa.types.is_struct(kind):
        inner = {field.name: decode for field in kind if (decode := _decoder(field, null_is_text))}
        return _of_struct(inner) if inner else None
    if pa.types.is_map(kind):
        item = _decoder(kind.item_field, null_is_text)
        return _of_map(item) if item else None
    if _is_list(kind):
        item = _decoder(kind.value_field, null_is_text)
        return _of_list(item) if item else None
    return None


def _is_list(kind: pa.DataType) -> bool:
    types = pa.types
    return bool(
        types.is_list(kind)
        or types.is_large_list(kind)
        or types.is_fixed_size_list(kind)
        or types.is_list_view(kind)
        or types.is_large_list_view(kind)
    )


def _of_struct(inner: Mapping[str, Decode]) -> Decode:
    def decode(value: Any) -> Any:
        if value is None:
            return None
        return {name: inner[name](item) if name in inner else item for name, item in value.items()}

    return decode


def _of_map(item: Decode) -> Decode:
    return lambda value: None if value is None else [(key, item(element)) for key, element in value]


def _of_list(item: Decode) -> Decode:
    return lambda value: None if value is None else [item(element) for element in value]
