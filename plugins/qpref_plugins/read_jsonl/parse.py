"""JSON text -> values, without what Python's parser lets through and what must not become data.

The standard library's parser, since it is the one that says where a text is wrong, and it can be asked to see keys that
stand twice, where faster ones keep the last in silence.
"""

from __future__ import annotations

import json
import re
from collections import Counter

MAX_ROW_BYTES = 4 * 2**20
"""Longest row; what is longer is a broken file, or somebody's attempt to fill the memory."""


_SURROGATE_ESCAPE = re.compile(r"\\u[dD][89a-fA-F]")


class BadJsonError(ValueError):
    """A text that is no JSON, or JSON that must not become data."""


class JsonParser:
    """Parses JSON values; NaN, repeated keys, half surrogate pairs and endless numbers are refused with the reason."""

    def __init__(self) -> None:
        self._faults: list[str] = []
        self._decoder = json.JSONDecoder(
            object_pairs_hook=self._object, parse_constant=self._constant, parse_int=self._integer
        )

    def parse(self, text: str) -> object:
        """The one value that the text holds, from its first character on.

        Raises:
            BadJsonError: says why it is none.
        """
        self._faults.clear()
        try:
            value, end = self._decoder.raw_decode(text)
            if rest := text[end:].lstrip():
                raise json.JSONDecodeError("Extra data", text, len(text) - len(rest))
        except json.JSONDecodeError as error:
            place = f"column {error.colno}" if error.lineno == 1 else f"line {error.lineno}, column {error.colno}"
            raise BadJsonError(f"not JSON: {reason_of(error)} at {place}") from None
        except RecursionError:
            raise BadJsonError("nested too deeply") from None
        self._refuse_faults(value, text, 0, len(text))
        return value

    def parse_at(self, text: str, start: int) -> tuple[object | BadJsonError, int]:
        """The value that begins at `start`, or what must not become data in it, and the place after it.

        Raises:
            json.JSONDecodeError, RecursionError: it has no end.
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
        # UTF-8 holds no surrogates, so half a pair can only come from an escape.
        if text.find("\\u", start, end) < 0 or not _SURROGATE_ESCAPE.search(text, start, end):
            return
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise BadJsonError("text holds half of a surrogate pair, which no UTF-8 text can") from None

    def _object(self, pairs: list[tuple[str, object]]) -> dict[str, object]:
        values = dict(pairs)
        if len(values) != len(pairs):
            repeated = Counter(key for key, _ in pairs).most_common(1)[0][0]
            self._faults.append(f"the key {repeated[:40]!r} stands twice")
        return values

    def _constant(self, name: str) -> None:
        self._faults.append(f"{name} is not JSON")

    def _integer(self, digits: str) -> int:
        try:
            return int(digits)
        except ValueError:  # Python's guard against quadratic time
            self._faults.append(f"a number of {len(digits)} digits")
            return 0


def reason_of(error: json.JSONDecodeError) -> str:
    return error.msg.removesuffix(" at")
