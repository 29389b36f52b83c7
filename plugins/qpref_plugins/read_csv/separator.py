"""Recognize the separator between a file's fields, by its header or by the line that Excel writes before it."""

from __future__ import annotations

import re
from dataclasses import dataclass

NAMES = {b",": "commas", b";": "semicolons", b"\t": "tabs", b"|": "vertical bars"}
"""Separators that are looked for, the likeliest first."""
_MARK = b"\xef\xbb\xbf"
_DIRECTIVE = re.compile(rb'"?sep=([^\w\s"]|\t)"?\r?\n', re.IGNORECASE)
_QUOTED = re.compile(rb'"[^"]*"?')


@dataclass(frozen=True, slots=True)
class Separator:
    """The separator of a file, and the number of lines before its header that name it."""

    separator: bytes
    num_lines: int = 0


def separator_of(head: bytes, expected: bytes) -> Separator:
    """Find the separator by a file's start.

    It is the expected one unless the first line is `sep=;`, or the header has none of it outside of quotes and has
    another of `NAMES`.
    """
    head = head.removeprefix(_MARK)
    if directive := _DIRECTIVE.match(head):
        return Separator(directive[1], num_lines=1)
    header = _QUOTED.sub(b"", head.lstrip(b"\r\n")).partition(b"\n")[0]
    if expected in header:
        return Separator(expected)
    return Separator(max(NAMES, key=header.count) if any(map(header.count, NAMES)) else expected)
