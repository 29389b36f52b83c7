"""Columns that hold messages as JSON text, as in CSV files: decoded before the row's format is recognized."""

from __future__ import annotations

from collections.abc import Collection

from qpref.records import Row
from qpref.rows.messages import has_speaker
from qpref.rows.pair_records import conversation_in
from qpref.rows.turn_notation import is_message
from qpref.rows.values import json_value


def with_decoded_messages(row: Row, columns: Collection[str]) -> Row:
    """Decode the columns whose text is the JSON of messages; any other text, JSON or not, stays a text.

    Args:
        columns: names of the columns that may hold messages.
    """
    texts = {name: value for name, value in row.values.items() if isinstance(value, str) and value[:1] in ("[", "{")}
    found = {name: json_value(text) for name, text in texts.items() if name in columns and "{" in text[:8]}
    decoded = {name: value for name, value in found.items() if _holds_messages(value)}
    return Row(values={**row.values, **decoded}, source=row.source) if decoded else row


def _holds_messages(value: object) -> bool:
    """Return whether a value is messages, one of them, lists of them, or an object that holds them."""
    if isinstance(value, dict):
        return is_message(value) or conversation_in(value) is not None
    if not isinstance(value, list) or not value:
        return False
    return all(has_speaker(item) if isinstance(item, dict) else _holds_messages(item) for item in value)
