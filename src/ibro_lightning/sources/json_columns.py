"""Decoding of ``arrow.json`` columns, in which ``datasets`` stores columns of mixed types.

pyarrow returns such values as JSON text (``"forty"`` with quotes, backslashes doubled). ``datasets`` stores text that
is itself valid JSON unquoted and decodes it on reading, so that "007" becomes 7 and "null" None. Here the spelling
decides between text and value.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from functools import partial
from typing import Any

import pyarrow as pa

Decode = Callable[[Any], Any]
_NAME = b"ARROW:extension:name"
_NUMBERS = re.compile(r"\[[-+0-9.eE,\s]*\]")


def json_value(text: Any, *, null_is_text: bool = False) -> Any:
    """The value of a cell of a JSON column; None and decoded values are returned unchanged.

    Numbers and lists in a spelling that no JSON writer produces are text: ``007``, ``1e5``, ``1.50``, ``[1, 2]``.

    With ``null_is_text``, so is ``null``, as in files of ``datasets``, where missing values are Arrow nulls.

    >>> [json_value(text) for text in ('"forty"', "12", "007", "1e5", "1.50", "[1, 2]", '["1",2]')]
    ['forty', 12, '007', '1e5', '1.50', '[1, 2]', ['1', 2]]
    """
    if not isinstance(text, str):
        return text
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
    if (field.metadata or {}).get(_NAME) == b"arrow.json":  # older pyarrow knows it as text
        return partial(json_value, null_is_text=null_is_text)
    return _decoder_of(field.type, null_is_text)


def _decoder_of(kind: pa.DataType, null_is_text: bool) -> Decode | None:
    types = pa.types
    if getattr(kind, "extension_name", None) == "arrow.json":
        return partial(json_value, null_is_text=null_is_text)
    if isinstance(kind, pa.BaseExtensionType):
        return _decoder_of(kind.storage_type, null_is_text)
    if types.is_dictionary(kind):
        return _decoder_of(kind.value_type, null_is_text)
    if types.is_struct(kind):
        inner = {field.name: decode for field in kind if (decode := _decoder(field, null_is_text))}
        return partial(_decode_struct, inner=inner) if inner else None
    if types.is_map(kind):
        item = _decoder(kind.item_field, null_is_text)
        return partial(_decode_map, item=item) if item else None
    is_list = types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind)
    if is_list or types.is_list_view(kind) or types.is_large_list_view(kind):
        item = _decoder(kind.value_field, null_is_text)
        return partial(_decode_list, item=item) if item else None
    return None


def _decode_list(values: Any, item: Decode) -> Any:
    return values and [item(value) for value in values]


def _decode_map(pairs: Any, item: Decode) -> Any:
    return pairs and [(key, item(value)) for key, value in pairs]


def _decode_struct(value: Any, inner: dict[str, Decode]) -> Any:
    return value and {name: inner[name](item) if name in inner else item for name, item in value.items()}
