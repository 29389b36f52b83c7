"""What most validators need: severities, the texts of messages, and places kept small."""

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
"""Of what is said of a whole source: it refuses no row."""

_LINE_BITS = 40


def report(severity: Severity, code: str, message: str, source: Source) -> tuple[Finding, ...]:
    """The finding with the severity that the recipe gives it; none where it is off."""
    if severity == "off":
        return ()
    return (Finding(code=code, severity="error" if severity == "error" else "warning", message=message, source=source),)


def text_of(messages: Sequence[Message]) -> str:
    """The text of some turns, one after the other; what a turn has beside its content, such as tool calls, as JSON."""
    if len(messages) == 1 and not messages[0].extra:
        return messages[0].content
    texts = []
    for message in messages:
        texts.append(message.content)
        if message.extra:
            texts.append(json.dumps(message.extra, sort_keys=True, ensure_ascii=False, default=str))
    return "\n".join(texts)


class Places:
    """Sources as integers of 64 bits and back, for checks that remember the places of millions of rows.

    A path gets a small number, which stands above the line's 40 bits.
    """

    def __init__(self) -> None:
        self._paths: list[str] = []
        self._numbers: dict[str, int] = {}

    @property
    def paths(self) -> Sequence[str]:
        """The paths by number."""
        return self._paths

    def number(self, source: Source) -> int:
        """The source as an integer: equal for equal sources."""
        path = self._numbers.get(source.path)
        if path is None:
            path = self._numbers[source.path] = len(self._paths)
            self._paths.append(source.path)
        return path << _LINE_BITS | source.line

    def source(self, number: int) -> Source:
        """The source that `number` gave this integer."""
        return Source(path=self._paths[number >> _LINE_BITS], line=number & ((1 << _LINE_BITS) - 1))

    @staticmethod
    def path_numbers(numbers: NDArray[np.int64]) -> NDArray[np.int64]:
        """The numbers of the paths alone, each an index in `paths`, of many places."""
        return numbers >> _LINE_BITS
