"""Texts and sides of an example row: a preference pair or a single completion, not yet tokenized."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from qpref.records import Message, PreferencePair, UnpairedExample

ExampleRow = PreferencePair | UnpairedExample


class RefusedRowError(ValueError):
    """A row that cannot be tokenized; becomes a finding at the row's location."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


def responses_of(row: ExampleRow) -> tuple[tuple[Message, ...], ...]:
    """Return the turns of each response: chosen and rejected, or the completion."""
    return (row.chosen, row.rejected) if isinstance(row, PreferencePair) else (row.completion,)


def sides_of(row: ExampleRow) -> tuple[str, ...]:
    """Return the names of the responses, in the order of `responses_of`."""
    return ("chosen", "rejected") if isinstance(row, PreferencePair) else ("completion",)


def texts_of(row: ExampleRow) -> Iterator[str]:
    """Yield every text of a row that a template may render: contents, extra keys and tools."""
    for turns in (row.prompt, *responses_of(row)):
        for message in turns:
            yield message.content
            yield from strings_in(message.extra)
    yield from strings_in(row.tools)


def strings_in(value: object) -> Iterator[str]:
    """Yield every text of a JSON value, keys included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield str(key)
            yield from strings_in(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from strings_in(item)
