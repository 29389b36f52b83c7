"""Texts of others made safe to print: control characters of terminals and of text direction are escaped.

A chat template, a file name, a model type or a row can hold escape sequences, with which a terminal hides lines,
changes its title or fills the clipboard. `PrintableStream` stands before standard output and standard error, so text
passes here wherever it comes from: messages, tables, logs, warnings of libraries, tracebacks.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from qpref.credentials import redact

# Line breaks and tabs stay. Bidirectional controls reorder what is shown; U+2028 and U+2029 are line breaks to some.
_UNSAFE = r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]|\r(?!\n)"
UNSAFE = re.compile(_UNSAFE)
STYLES = r"\x1b\[[0-9;]*m|\x1b\[\?25[hl]|\x1b\[[0-9]*[ABGK]|\r"
"""Sequences by which a progress bar draws itself: colours, the cursor's lines, its visibility."""
UNSAFE_BUT_STYLES = re.compile(f"({STYLES})|{_UNSAFE}")


def printable(text: str) -> str:
    r"""Escape control characters as \uXXXX, which leaves JSON valid, and hide passwords and tokens."""
    return UNSAFE.sub(_escaped, redact(text))


def _escaped(found: re.Match[str]) -> str:
    return f"\\u{ord(found[0]):04x}"


def _printable_but_styles(text: str) -> str:
    return UNSAFE_BUT_STYLES.sub(lambda found: found[0] if found[1] else _escaped(found), redact(text))


class PrintableStream:
    """A text stream before another one, which gets printable text alone.

    On a terminal the sequences of a progress bar pass; messages are made printable before they come here.
    """

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        is_terminal = self._stream.isatty()
        self._stream.write(_printable_but_styles(text) if is_terminal else printable(text))
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.write(line)

    def close(self) -> None:
        """Flush, and stay open: a plugin's `sys.stdout.close()` would end the command at its next line."""
        self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
