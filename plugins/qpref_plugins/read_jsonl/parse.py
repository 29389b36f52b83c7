"""Strict JSON parsing: NaN, duplicate keys and half surrogate pairs are errors, though Python's json accepts them.

It wraps the standard library's parser, which reports the position of an error and can report duplicate keys; faster
parsers silently keep the last one.
"""

from __future__ import annotations

import json
import re
from collections import Counter

from qpref_plugins.read_jsonl.causes import cause_of

MAX_ROW_BYTES = 4 * 2**20
"""Maximum size of a row; a longer one is a broken file, or an attempt to exhaust memory."""

_SURROGATE_ESCAPE = re.compile(r"\\u[dD][89a-fA-F]")


class BadJsonError(ValueError):
    """Invalid JSON, or JSON with values that are refused.

    Args:
        cause: why the text is not JSON, where that is known.
        at: offset of the error.
    """

    def __init__(self, message: str, cause: str = "", at: int | None = None) -> None:
        super().__init__(message)
        self.cause, self.at = cause, at


class JsonParser:
    """A JSON parser that refuses NaN, duplicate keys, half surrogate pairs and huge integers, with the reason."""

    def __init__(self) -> None:
        self._faults: list[str] = []
        self._decoder = json.JSONDecoder(
            object_pairs_hook=self._object, parse_constant=self._constant, parse_int=self._integer
        )

    def parse(self, text: str) -> object:
        """Parse a text that holds exactly one value.

        Raises:
            BadJsonError: it doesn't.
        """
        self._faults.clear()
        try:
            value, end = self._decoder.raw_decode(text)
            if rest := text[end:].lstrip():
                raise json.JSONDecodeError("Extra data", text, len(text) - len(rest))
        except json.JSONDecodeError as error:
            cause = cause_of(text, error)
            message = f"{cause} (column {error.colno})" if cause else f"{reason_of(error)} at column {error.colno}"
            raise BadJsonError(f"not JSON: {message}", cause, error.pos) from None
        except RecursionError:
            raise BadJsonError("nested too deeply") from None
        self._refuse_faults(value, text, 0, len(text))
        return value

    def parse_at(self, text: str, start: int) -> tuple[object | BadJsonError, int]:
        """Parse the value that starts at `start`; returns it, or the error that refuses it, and the offset after it.

        Raises:
            json.JSONDecodeError, RecursionError: the value is invalid, so that its end is unknown.
        """
        self._faults.clear()
        value, end = self._decoder.raw_decode(text, start)
        try:
            self._refuse_faults(value, text, start, end)
        except BadJsonError as error:
            return error, end
        return value, end

    def _refuse_faults(self, value: object, text: str, start: int, end: int) -> None:
        if self._faults:
            raise BadJsonError(self._faults[0])
        # Valid UTF-8 has no surrogates, so half a pair can only come from an escape.
        if not _SURROGATE_ESCAPE.search(text, start, end):
            return
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise BadJsonError("text has half of a surrogate pair, which isn't valid Unicode") from None

    def _object(self, pairs: list[tuple[str, object]]) -> dict[str, object]:
        values = dict(pairs)
        if len(values) != len(pairs):
            repeated = Counter(key for key, _ in pairs).most_common(1)[0][0]
            self._faults.append(f"duplicate key {repeated[:40]!r}; remove one of the two")
        return values

    def _constant(self, name: str) -> None:
        self._faults.append(f"{name} is not JSON; write null, or leave the key out")

    def _integer(self, digits: str) -> int:
        try:
            return int(digits)
        except ValueError:  # Python's guard against quadratic time
            self._faults.append(f"a number of {len(digits)} digits, which is too large")
            return 0


def reason_of(error: json.JSONDecodeError) -> str:
    """Return the parser's message without its dangling "at"."""
    return error.msg.removesuffix(" at")
