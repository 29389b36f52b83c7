"""Shared tools for validators: severities, message texts, and sources packed into integers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from qpref.records import Finding, Message, Source

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

Severity = Literal["error", "warn", "off"]
SourceSeverity = Literal["warn", "off"]
"""Severity of a finding about a whole source, which refuses no row."""

_LINE_BITS = 40


def report(severity: Severity, code: str, message: str, source: Source) -> tuple[Finding, ...]:
    """Make a finding with the severity that the recipe sets; empty where it is off."""
    if severity == "off":
        return ()
    return (Finding(code=code, severity="error" if severity == "error" else "warning", message=message, source=source),)


def text_of(messages: Sequence[Message]) -> str:
    """Join the text of the turns, one per line; extra keys of a turn, such as tool calls, follow as JSON."""
    if len(messages) == 1 and not messages[0].extra:
        return messages[0].content
    texts = []
    for message in messages:
        texts.append(message.content)
        if message.extra:
            texts.append(json.dumps(message.extra, sort_keys=True, ensure_ascii=False, default=str))
    return "\n".join(texts)


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
