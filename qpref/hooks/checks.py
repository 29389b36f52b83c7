"""Shared tools for validators: severities, message texts, counted rows, and sources packed into integers."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, Literal
from unicodedata import normalize

from qpref.hooks.types import Split
from qpref.records import Finding, Message, Source

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

Severity = Literal["error", "warn", "off"]
SourceSeverity = Literal["warn", "off"]
"""Severity of a finding about a whole source, which refuses no row."""

NUM_LINES = 5
"""Lines that a counted warning names."""

_LINE_BITS = 40


def report(severity: Severity, code: str, message: str, source: Source) -> tuple[Finding, ...]:
    """Make a finding with the severity that the recipe sets; empty where it is off."""
    if severity == "off":
        return ()
    return (Finding(code=code, severity="error" if severity == "error" else "warning", message=message, source=source),)


def text_of(messages: Sequence[Message]) -> str:
    """Join the text of the turns, one per line; extra keys of a turn, such as tool calls, follow as JSON.

    Ids of calls are left out: each generation makes up its own.
    """
    if len(messages) == 1 and not messages[0].extra:
        return messages[0].content
    texts = []
    for message in messages:
        texts.append(message.content)
        if message.extra:
            texts.append(json.dumps(_without_ids(message.extra), sort_keys=True, ensure_ascii=False, default=str))
    return "\n".join(texts)


def composed(messages: Sequence[Message]) -> str:
    """Join the text of the turns in Unicode's composed form (NFC), for texts that are compared or hashed."""
    text = text_of(messages)
    return text if text.isascii() else _nfc(text)


@lru_cache(maxsize=4)
def _nfc(text: str) -> str:
    return normalize("NFC", text)


def _without_ids(extra: Mapping[str, object]) -> dict[str, object]:
    values = {key: value for key, value in extra.items() if key != "tool_call_id"}
    calls = values.get("tool_calls")
    if isinstance(calls, list):
        values["tool_calls"] = [{key: value for key, value in call.items() if key != "id"} for call in calls]
    return values


@dataclass(slots=True)
class _Tally:
    """Distinct rows, which come in order; the pairs of a ranking are one row."""

    count: int = 0
    last: int = -1
    first: list[int] = field(default_factory=list)

    def add(self, line: int) -> None:
        if line == self.last:
            return
        self.last = line
        self.count += 1
        if self.count <= NUM_LINES:
            self.first.append(line)


@dataclass(frozen=True, slots=True)
class CountedRows:
    """The rows of one source and split that have something in common.

    Attributes:
        source: the whole source, for a finding.
        share: their number as text: "12 of 3500 training rows (0.3%)".
        lines: the first of them as text: "first at lines 3, 9, 14, 20, 21".
    """

    source: Source
    count: int
    share: str
    lines: str


class RowCounts:
    """Counts rows by source, split and a key of the check's own, for one warning in place of one for each row."""

    def __init__(self) -> None:
        self._rows: dict[tuple[str, Split], _Tally] = {}
        self._hits: dict[tuple[str, Split], dict[str, _Tally]] = {}

    def add(self, source: Source, split: Split, keys: Iterable[str] = ()) -> None:
        """Count an example's row, among all rows and once for each key."""
        place = source.path, split
        rows = self._rows.get(place)
        if rows is None:
            rows, self._hits[place] = self._rows.setdefault(place, _Tally()), {}
        rows.add(source.line)
        for key in keys:
            self._hits[place].setdefault(key, _Tally()).add(source.line)

    def __iter__(self) -> Iterator[dict[str, CountedRows]]:
        """Yield the counts of each source and split that has any, by key, most rows first."""
        for place, hits in self._hits.items():
            if hits:
                ranked = sorted(hits.items(), key=lambda item: -item[1].count)
                yield {key: self._counted(place, tally) for key, tally in ranked}

    def _counted(self, place: tuple[str, Split], tally: _Tally) -> CountedRows:
        path, split = place
        total = self._rows[place].count
        rows = f"{'training' if split == 'train' else 'held-out'} {'row' if total == 1 else 'rows'}"
        lines = ", ".join(map(str, tally.first))
        return CountedRows(
            source=Source(path=path, line=0),
            count=tally.count,
            share=f"{tally.count} of {total} {rows} ({tally.count / total:.1%})",
            lines=f"{'first ' if tally.count > NUM_LINES else ''}at line{'s' if tally.count > 1 else ''} {lines}",
        )


class Places:
    """Sources as 64-bit integers and back, for checks that remember the locations of millions of rows.

    The low 40 bits are the line, the bits above them the index of the path.
    """

    def __init__(self) -> None:
        self._paths: list[str] = []
        self._numbers: dict[str, int] = {}

    @property
    def paths(self) -> Sequence[str]:
        """Paths, by index."""
        return self._paths

    def number(self, source: Source) -> int:
        """Pack the source into an integer; equal sources give equal integers."""
        path = self._numbers.get(source.path)
        if path is None:
            path = self._numbers[source.path] = len(self._paths)
            self._paths.append(source.path)
        return path << _LINE_BITS | source.line

    def source(self, number: int) -> Source:
        """Unpack an integer that `number` returned."""
        return Source(path=self._paths[number >> _LINE_BITS], line=number & ((1 << _LINE_BITS) - 1))

    @staticmethod
    def path_numbers(numbers: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the path index of each packed source, for indexing `paths`."""
        return numbers >> _LINE_BITS
