"""Texts and sides of an example row: a preference pair, a ranked list or a single completion, not yet tokenized."""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Mapping, Sequence

from qpref.records import Message, PreferencePair, RankedList, TokenizedExample, UnpairedExample

RowRecord = PreferencePair | UnpairedExample
"""What a row of a file becomes, and checks see."""
ExampleRow = RowRecord | RankedList
"""What is tokenized."""


class RefusedRowError(ValueError):
    """A row that cannot be tokenized; becomes a finding at the row's location."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


def responses_of(row: ExampleRow) -> tuple[tuple[Message, ...], ...]:
    """Return the turns of each response: chosen and rejected, those of a list, or the completion."""
    if isinstance(row, RankedList):
        return row.responses
    return (row.chosen, row.rejected) if isinstance(row, PreferencePair) else (row.completion,)


def sides_of(row: ExampleRow) -> tuple[str, ...]:
    """Return the names of the responses, in the order of `responses_of`."""
    if isinstance(row, RankedList):
        return tuple(f"response {number}" for number in range(1, 1 + len(row.responses)))
    return ("chosen", "rejected") if isinstance(row, PreferencePair) else ("completion",)


def tokenized_row(
    row: ExampleRow, prompt: array[int], branches: Sequence[array[int]], prompt_cut: bool = False
) -> TokenizedExample:
    """Build the tokenized example of a row from the ids of its prompt and of its responses."""
    return TokenizedExample(
        prompt=prompt,
        branches=tuple(branches),
        truncated=(False,) * len(branches),
        prompt_cut=prompt_cut,
        weight=row.weight,
        margin=0.0 if isinstance(row, UnpairedExample) else row.margin,
        label=row.label if isinstance(row, UnpairedExample) else None,
        ranks=row.ranks if isinstance(row, RankedList) else (),
        scores=row.scores if isinstance(row, RankedList) else (),
        number=row.number,
        columns=row.columns,
        source=row.source,
    )


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
