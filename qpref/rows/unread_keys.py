"""Texts of messages under keys that no chat template gets: one warning for a source, naming them.

Keys that identify a message, or say when or how it was made, may be lost without a word.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping

from qpref.records import Finding, Row, Source
from qpref.rows.messages import reasoning_of
from qpref.rows.turn_notation import CALLERS, SPEAKER_KEYS, by_message, content_in
from qpref.rows.values import json_value, named

READ = frozenset({*SPEAKER_KEYS, "content", "name", "tool_calls", "tool_call_id", *CALLERS, "candidates"})
"""Keys whose values are a part of the message, beside its content and its reasoning."""
READ_OF_PARTS = frozenset({"text", "thinking", "reasoning", "refusal"})
LAST_WORDS = frozenset({
    *("id", "ids", "uuid", "hash", "ip", "signature", "index"),
    *("at", "time", "timestamp", "date"),
    *("model", "language", "lang"),
})  # fmt: skip
"""Last words of keys that identify a message, or say when, by which model and in which language it was written."""
RECORDS = frozenset({"type", "status", "finish_reason", "stop_reason"})
MAX_DEPTH = 4
_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+")


class UnreadKeys:
    """Count the rows in which each key of a message holds text that is left out.

    Args:
        columns: names of the columns that may hold messages.
    """

    def __init__(self, columns: Collection[str]) -> None:
        self._columns = frozenset(columns)
        self._counts: dict[str, Counter[str]] = {}
        self._num_rows: Counter[str] = Counter()

    def note(self, row: Row) -> None:
        """Count the keys of a row's messages."""
        keys: set[str] = set()
        for column in self._columns.intersection(row.values):
            value = row.values[column]
            if isinstance(value, str) and value[:1] not in ("[", "{"):
                continue  # a text, as most columns are
            for turn in _messages(value):
                keys |= unread_keys(turn)
        if keys:
            self._counts.setdefault(row.source.path, Counter()).update(keys)
            self._num_rows[row.source.path] += 1

    def findings(self) -> Iterator[Finding]:
        """Yield a warning for each source that has such keys."""
        for path, counts in self._counts.items():
            num_rows = self._num_rows[path]
            message = (
                f"messages of {num_rows} {'row' if num_rows == 1 else 'rows'} have texts under keys that aren't read: "
                f"{named(key for key, _ in counts.most_common())}; move what the model has to see into content or "
                "reasoning_content"
            )
            yield Finding(code="unread_key", severity="warning", message=message, source=Source(path=path, line=0))


def unread_keys(turn: Mapping[str, object]) -> set[str]:
    """Return the keys of a message, and of the parts of its content, that hold text which isn't read.

    Records of how the message was made don't count.
    """
    others, content = turn.keys() - READ, turn.get("content")
    if not others and not isinstance(content, list):
        return set()
    content = content_in(turn)
    known = [content, reasoning_of(turn)]
    found = {
        key for key in others if turn[key] is not content and not _is_record(key) and _holds_text(turn[key], known)
    }
    for part in content if isinstance(content, list) else ():
        keys = part.keys() - READ_OF_PARTS if isinstance(part, dict) else ()
        found.update(key for key in keys if not _is_record(key) and _holds_text(part[key], known))
    return found


def _is_record(key: str) -> bool:
    words = _WORD.findall(key)
    return key in RECORDS or bool(words and words[-1].lower() in LAST_WORDS)


def _holds_text(value: object, known: Collection[object]) -> bool:
    """Return whether a value holds a text that isn't blank, known, or a record."""
    if isinstance(value, str):
        return bool(value.strip()) and value not in known
    if isinstance(value, Mapping):
        return any(_holds_text(inner, known) for key, inner in value.items() if not _is_record(str(key)))
    return isinstance(value, list) and any(_holds_text(inner, known) for inner in value)


def _messages(value: object, depth: int = 0) -> Iterator[Mapping[str, object]]:
    """Yield the messages in a column: a message, lists of them, their JSON text, or an object that holds them."""
    if isinstance(value, str):
        value = json_value(value) if value[:1] in ("[", "{") and "{" in value[:8] and depth == 0 else None
    if isinstance(value, dict):
        value = by_message(value)
    if isinstance(value, Mapping):
        if any(isinstance(value.get(key), str) for key in SPEAKER_KEYS) or (depth == 0 and content_in(value)):
            yield value
            return
        value = list(value.values())
    if isinstance(value, list) and depth < MAX_DEPTH:
        for inner in value:
            yield from _messages(inner, depth + 1)
