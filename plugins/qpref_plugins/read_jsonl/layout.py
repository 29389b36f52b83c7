"""Recognize the layout of a JSON file by its first bytes, and refuse files whose rows are inside of something."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Sequence
from typing import Literal

from qpref.errors import DataError
from qpref_plugins.read_jsonl.causes import FAULTS_OF_A_LINE
from qpref_plugins.read_jsonl.lines import TWICE
from qpref_plugins.read_jsonl.parse import BadJsonError, JsonParser

Layout = Literal["lines", "array", "objects"]
"""One object a line, one array of objects, or objects of which each may take several lines."""

_NUM_LINES = 8
_ROWS_KEYS = ("data", "rows", "train", "examples", "items", "records", "results", "instances", "samples", "dataset")
_SPEAKER = frozenset({"role", "from", "content", "value"})
_PROMPTS = frozenset({"prompt", "instruction", "question", "chosen", "conversations"})
_ROWS_INSIDE = re.compile(
    rf'\{{\s*(?:"[^"]*"\s*:\s*(?:"[^"]*"|[\w.+-]+)\s*,\s*)*"(?P<key>{"|".join(_ROWS_KEYS)})"\s*:\s*\[\s*\{{'
)
_COLUMNS_INSIDE = re.compile(r'\{\s*"[^"]*"\s*:\s*\{\s*"0"\s*:')
_AS_LINES = 'write it with DataFrame.to_json(..., orient="records", lines=True), or as a Dataset\'s to_json does'


def layout_of(head: str) -> Layout | None:
    """Decide the layout by a file's start, without white space before it; None where it isn't JSON objects or an array.

    An object whose first line isn't an object by itself may be a bad line of JSON Lines: it counts as one over several
    lines only if its second line continues it. An array on the first line before another one is a bad line.
    """
    first, _, rest = head.partition("\n")
    if head[:1] not in ("[", "{"):
        return None
    continued = len(first) + 1 + len(rest) - len(rest.lstrip())
    try:
        _, end = JsonParser().parse_at(head, 0)
    except json.JSONDecodeError as error:
        end = error.pos if error.pos > continued and not _is_object(rest.lstrip().partition("\n")[0]) else 0
    except RecursionError:
        end = 0
    if head[0] == "[":
        return "lines" if 0 < end <= len(first) and rest.lstrip()[:1] == "[" else "array"
    return "objects" if end > len(first) or first.strip() == "{" else "lines"


def _is_object(line: str) -> bool:
    try:
        return isinstance(JsonParser().parse(line), dict)
    except BadJsonError:
        return False


def refuse_foreign(head: str, path: str) -> None:
    """Refuse a file whose first lines are all bad for one reason: the reason is the file's, and not each line's.

    Raises:
        DataError: names the reason.
    """
    lines = [line for line in head.split("\n")[:-1] if line.strip()][:_NUM_LINES]
    causes = {_cause(line) for line in lines}
    if len(lines) < 2 or len(causes) > 1 or None in causes:
        return
    (cause,) = causes
    if cause:
        raise DataError(f"{path}: its lines are no JSON objects: {cause}")
    table = next((name for name, separator in (("tsv", "\t"), ("csv", ",")) if separator in lines[0]), None)
    hint = f'; for a table with a header set [data] reader = "{table}"' if table else ""
    raise DataError(f"{path}: not JSON Lines: none of its first {len(lines)} lines is an object{hint}")


def _cause(line: str) -> str | None:
    """Return the notation of a line that is not JSON; empty if it doesn't even start as JSON, None for other lines."""
    try:
        value = JsonParser().parse(line.strip().removesuffix(","))
    except BadJsonError as error:
        is_own = error.cause.startswith(FAULTS_OF_A_LINE) or (not error.cause and error.at != 0)
        return None if is_own else error.cause
    return TWICE if isinstance(value, str) and value.lstrip()[:1] == "{" else None


def refuse_wrapped(head: str, path: str) -> None:
    """Refuse one object that holds all rows, in a list or by columns.

    Raises:
        DataError: says where the rows are, and how to write them.
    """
    if head[:1] != "{":
        return
    try:
        value, end = JsonParser().parse_at(head, 0)
    except (json.JSONDecodeError, RecursionError):
        value, end = None, len(head)
    if head[end:].strip():
        return
    if isinstance(value, dict):
        key, by_columns = _rows_key(value), _are_columns(list(value.values()))
        if _are_rows(value):
            raise DataError(f"{path}: one object, whose values are the rows; write each on a line: jq -c '.[]' FILE")
    else:
        found = _ROWS_INSIDE.match(head)
        key, by_columns = found and found["key"], bool(_COLUMNS_INSIDE.match(head))
    if key:
        raise DataError(f"{path}: one object, whose rows are its list '{key}'; write that list alone: jq .{key} FILE")
    if by_columns:
        raise DataError(f"{path}: one object that holds the columns of a table, not its rows; {_AS_LINES}")


def _rows_key(value: dict[str, object]) -> str | None:
    """Return the key of the list that holds the rows: a usual name, or the only key unless it holds messages."""
    lists = [key for key, inner in value.items() if isinstance(inner, list) and inner and _all_objects(inner)]
    if len(value) == len(lists) == 1 and not _SPEAKER.intersection(*value[lists[0]]):  # type: ignore[misc]
        return lists[0]
    return next((key for key in _ROWS_KEYS if key in lists), None)


def _all_objects(values: Sequence[object]) -> bool:
    return all(isinstance(value, dict) for value in values)


def _are_rows(value: dict[str, object]) -> bool:
    """Return whether an object's values are rows, as under their ids: objects that each have a prompt."""
    prompts = [_PROMPTS.intersection(inner) for inner in value.values() if isinstance(inner, dict)]
    return len(prompts) == len(value) > 1 and all(prompts) and not {"chosen", "rejected"} & value.keys()


def _are_columns(values: Sequence[object]) -> bool:
    """Return whether an object's values are columns: texts in lists of one length, or numbered as pandas does."""
    if len(values) < 2:
        return False
    if all(isinstance(value, dict) and value and all(map(str.isdecimal, value)) for value in values):
        return True
    sizes = {len(value) for value in values if isinstance(value, list)}
    kinds = {type(item) for item in itertools.chain(*(value for value in values if isinstance(value, list)))}
    return all(isinstance(value, list) for value in values) and len(sizes) == 1 and kinds == {str}
