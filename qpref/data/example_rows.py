"""What pairs and single completions have in common, as far as their texts go."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from qpref.records import Message, PreferencePair, UnpairedExample

ExampleRow = PreferencePair | UnpairedExample


class RefusedRowError(ValueError):
    """Why a row cannot be tokenized; becomes a finding at the row's place."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


def responses_of(row: ExampleRow) -> tuple[tuple[Message, ...], ...]:
    return (row.chosen, row.rejected) if isinstance(row, PreferencePair) else (row.completion,)


def sides_of(row: ExampleRow) -> tuple[str, ...]:
    return ("chosen", "rejected") if isinstance(row, PreferencePair) else ("completion",)


def texts_of(row: ExampleRow) -> Iterator[str]:
    """Every text of a row that a template may put into a prompt or a response."""
    for turns in (row.prompt, *responses_of(row)):
        for message in turns:
            yield message.content
            yield from _strings(message.extra)
    yield from _strings(row.tools)


def _strings(value: object) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield str(key)
            yield from _strings(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _strings(item)
