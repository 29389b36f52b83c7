"""JSON Lines, and a JSON file that holds one array of objects."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from qpref.hooks import Reader, hookimpl
from qpref.records import Finding, Row, Source

MAX_LINE_BYTES = 4 * 2**20
MAX_ARRAY_BYTES = 1 * 2**30


class _BadJson(ValueError):
    """JSON that Python's parser lets through and that must not become data."""


def _refuse_constant(name: str) -> object:
    raise _BadJson(f"{name} is not JSON")


def _refuse_repeated_keys(pairs: list[tuple[str, object]]) -> dict[str, object]:
    values = dict(pairs)
    if len(values) != len(pairs):
        repeated = Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise _BadJson(f"the key '{repeated}' stands twice")
    return values


_DECODER = json.JSONDecoder(parse_constant=_refuse_constant, object_pairs_hook=_refuse_repeated_keys)


def _parse(text: str) -> object:
    """Parse one JSON value; every way in which that can fail comes out as _BadJson."""
    try:
        value = _DECODER.decode(text)
        json.dumps(value, ensure_ascii=False).encode()  # a lone surrogate passes the parser and no tokenizer
    except _BadJson:
        raise
    except UnicodeEncodeError:
        raise _BadJson("text holds half of a surrogate pair, which no UTF-8 text can") from None
    except RecursionError:
        raise _BadJson("nested too deeply") from None
    except json.JSONDecodeError as error:
        place = f"column {error.colno}" if error.lineno == 1 else f"line {error.lineno}, column {error.colno}"
        raise _BadJson(f"not JSON: {error.msg.removesuffix(' at')} at {place}") from None
    except ValueError as error:
        raise _BadJson(f"not JSON: {error}") from None
    return value


def _row(value: object, source: Source) -> Row | Finding:
    if not isinstance(value, dict):
        return _unreadable(f"expected a JSON object, found {type(value).__name__}", source)
    return Row(values=value, source=source)


def _unreadable(message: str, source: Source) -> Finding:
    return Finding(code="unreadable", severity="error", message=message, source=source)


def read_lines(path: Path) -> Iterator[Row | Finding]:
    """One object a line; blank lines are passed over. One line at a time is in memory."""
    with path.open("rb") as file:
        number = 0
        while line := file.readline(MAX_LINE_BYTES + 1):
            number += 1
            source = Source(path=str(path), line=number)
            if len(line) > MAX_LINE_BYTES:
                while line and not line.endswith(b"\n"):
                    line = file.readline(MAX_LINE_BYTES)
                yield _unreadable(f"the line is longer than {MAX_LINE_BYTES // 2**20} MiB", source)
                continue
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8").strip()
                if text:
                    yield _row(_parse(text), source)
            except UnicodeDecodeError as error:
                yield _unreadable(f"not UTF-8 (byte {error.start + 1} of the line)", source)
            except _BadJson as error:
                yield _unreadable(str(error), source)


def read_array(path: Path) -> Iterator[Row | Finding]:
    """A whole file that is one array of objects; an element's place counts as its line."""
    whole = Source(path=str(path), line=1)
    if path.stat().st_size > MAX_ARRAY_BYTES:
        yield _unreadable("larger than 1 GiB; make it JSON Lines, which is read line by line", whole)
        return
    try:
        array = _parse(path.read_bytes().decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        yield _unreadable(f"not UTF-8 (byte {error.start + 1})", whole)
        return
    except _BadJson as error:
        yield _unreadable(str(error), whole)
        return
    if not isinstance(array, list):
        yield _unreadable(f"expected an array of objects, found {type(array).__name__}", whole)
        return
    for number, value in enumerate(array, start=1):
        yield _row(value, Source(path=str(path), line=number))


@hookimpl
def qpref_readers() -> Iterator[Reader]:
    yield Reader(name="jsonl", summary="JSON Lines: one object a line", read=read_lines)
    yield Reader(name="json", summary="a JSON array of objects", read=read_array)
