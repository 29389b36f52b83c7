"""Values of Arrow's types as JSON values.

Dates and times are ISO 8601 texts, durations are seconds, decimals are numbers, bytes are UTF-8 text where they can be,
maps are objects. Null fields of structs are dropped: Arrow gives every struct of a column the fields of all.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Callable
from decimal import Decimal
from typing import Any
from uuid import UUID

import pyarrow
from pyarrow import types

Convert = Callable[[Any], Any]
_LISTS = (types.is_list, types.is_large_list, types.is_fixed_size_list, types.is_list_view, types.is_large_list_view)
_PLAIN = (
    types.is_null, types.is_boolean, types.is_integer, types.is_floating, types.is_string, types.is_large_string,
    types.is_string_view,
)  # fmt: skip


class BadCellError(ValueError):
    """A value that has no equivalent in JSON."""


def conversion(kind: Any) -> Convert | None:
    """Return the function from pyarrow's Python values of a type to JSON values; None where they are the same."""
    if any(is_kind(kind) for is_kind in _PLAIN):
        return None
    if isinstance(kind, pyarrow.JsonType):
        return _or_null(_parsed)
    if types.is_struct(kind):
        return _struct(kind)
    if types.is_map(kind):
        return _map(kind)
    if any(is_kind(kind) for is_kind in _LISTS):
        inner = conversion(kind.value_type)
        return inner and _or_null(lambda values: [inner(value) for value in values])
    if types.is_dictionary(kind) or types.is_run_end_encoded(kind):
        return conversion(kind.value_type)
    if types.is_timestamp(kind) and kind.tz is None:
        return _or_null(_date_or_time)
    return _scalar


def _or_null(convert: Convert) -> Convert:
    return lambda value: None if value is None else convert(value)


def _struct(kind: Any) -> Convert:
    fields = {field.name: conversion(field.type) or _same for field in kind}

    def convert(values: dict[str, Any]) -> dict[str, Any]:
        return {name: fields[name](value) for name, value in values.items() if value is not None}

    return _or_null(convert)


def _map(kind: Any) -> Convert:
    inner = conversion(kind.item_type) or _same

    def convert(pairs: list[tuple[Any, Any]]) -> dict[str, Any]:
        values = {str(_scalar(key)): inner(value) for key, value in pairs}
        if len(values) < len(pairs):
            raise BadCellError("a map has a key twice")
        return {key: value for key, value in values.items() if value is not None}

    return _or_null(convert)


def _same(value: Any) -> Any:
    return value


def _parsed(text: str) -> Any:
    try:
        return json.loads(text, parse_constant=_refuse)
    except (ValueError, RecursionError) as error:
        raise BadCellError(f"invalid JSON: {error}") from None


def _refuse(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _date_or_time(value: Any) -> Any:
    """Write midnight as a date: Arrow's JSON reader takes texts of dates for timestamps."""
    if isinstance(value, datetime.datetime) and value.time() == datetime.time():
        return value.date().isoformat()
    return _scalar(value)


def _scalar(value: Any) -> Any:
    """Convert a single value; a type without an equivalent in JSON stays."""
    if isinstance(value, datetime.date | datetime.time):  # a datetime is a date
        return value.isoformat()
    if isinstance(value, datetime.timedelta):
        return value.total_seconds()
    if isinstance(value, Decimal):
        return int(value) if value == value.to_integral_value() else float(value)
    if isinstance(value, bytes):
        return _text_or_bytes(value)
    return str(value) if isinstance(value, UUID) else value


def _text_or_bytes(value: bytes) -> str | bytes:
    try:
        return value.decode()
    except UnicodeDecodeError:
        return value


def temporal_as_text(table: Any) -> Any:
    """Cast all dates, times and durations of a table to Arrow's texts of them."""
    fields = [pyarrow.field(field.name, _textual(field.type)) for field in table.schema]
    return pyarrow.Table.from_arrays(
        [column.cast(field.type) for column, field in zip(table.columns, fields, strict=True)],
        schema=pyarrow.schema(fields),
    )


def _textual(kind: Any) -> Any:
    if types.is_temporal(kind):
        return pyarrow.string()
    if types.is_struct(kind):
        return pyarrow.struct([pyarrow.field(field.name, _textual(field.type)) for field in kind])
    if types.is_map(kind):
        return pyarrow.map_(_textual(kind.key_type), _textual(kind.item_type))
    if any(is_kind(kind) for is_kind in _LISTS):
        return pyarrow.list_(_textual(kind.value_type))
    return _textual(kind.value_type) if types.is_dictionary(kind) else kind
