"""Checks of what plugins hand over: the fields of their records, findings and rows; each problem in one sentence."""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from packaging.requirements import InvalidRequirement, Requirement

from qpref.hooks.reader import Reader
from qpref.hooks.reward import Reward
from qpref.hooks.types import MetricSink, Validator
from qpref.records import Finding, Row, Source

SEVERITIES = ("error", "warning")
TAKES = ("file", "folder", "name")
_CODE = re.compile(r"[A-Za-z][\w.-]{0,99}")
_PAGE_LINES = 512


def record_problem(record: Any) -> str | None:
    """Return the first field of a plugin's record that has a wrong type or value, with what is expected."""
    return next(_record_problems(record), None)


def _record_problems(record: Any) -> Iterator[str]:
    from qpref.hooks.options import Options

    kind = type(record).__name__
    if not isinstance(record.name, str) or not record.name:
        yield f"the name of its {kind} is {record.name!r}, and has to be a text"
    if not isinstance(record.summary, str):
        yield f"{kind} '{record.name}': summary is {record.summary!r}, and has to be a text"
    has_none = isinstance(record, Reader) and record.options is None
    if not has_none and not (isinstance(record.options, type) and issubclass(record.options, Options)):
        yield f"{kind} '{record.name}': options is {record.options!r}, and has to be a subclass of qpref.hooks.Options"
    for field in ("build", "start", "open", "read"):
        if not callable(getattr(record, field, print)):
            yield f"{kind} '{record.name}': {field} is {getattr(record, field)!r}, and has to be a function"
    for problem in _OF_KIND.get(type(record), lambda record: ())(record):
        yield f"{kind} '{record.name}': {problem}"


def _validator_problems(record: Validator) -> Iterator[str]:
    if not isinstance(record.skips_refused, bool):
        yield f"skips_refused is {record.skips_refused!r}, and has to be True or False"
    if problem := _arguments_problem("start", record.start, "options"):
        yield problem


def _sink_problems(record: MetricSink) -> Iterator[str]:
    seconds: Any = record.close_seconds
    is_number = isinstance(seconds, int | float) and not isinstance(seconds, bool)
    if not (is_number and math.isfinite(seconds) and seconds > 0):
        yield f"close_seconds is {seconds!r}, and has to be a number of seconds above 0"
    yield from _requirement_problems(record)
    if problem := _arguments_problem("open", record.open, "options", "context"):
        yield problem


def _reward_problems(record: Reward) -> Iterator[str]:
    yield from _requirement_problems(record)
    if problem := _arguments_problem("build", record.build, "options"):
        yield problem


def _requirement_problems(record: MetricSink | Reward) -> Iterator[str]:
    if isinstance(record.requires, str) or not all(map(_is_requirement, record.requires)):
        yield f'requires is {record.requires!r}, and has to be requirements such as ("acme-client>=2",)'


def _reader_problems(record: Reader) -> Iterator[str]:
    if record.takes not in TAKES:
        yield f"takes is {record.takes!r}, and has to be one of {', '.join(map(repr, TAKES))}"
    arguments = ("path",) if record.options is None else ("path", "context")
    if problem := _arguments_problem("read", record.read, *arguments):
        yield problem + (", since it has options" if len(arguments) == 2 else ", since it has no options")


_OF_KIND: dict[type, Callable[[Any], Iterator[str]]] = {
    Validator: _validator_problems,
    MetricSink: _sink_problems,
    Reader: _reader_problems,
    Reward: _reward_problems,
}


def _is_requirement(line: object) -> bool:
    try:
        Requirement(str(line))
    except InvalidRequirement:
        return False
    return isinstance(line, str)


def _arguments_problem(field: str, function: Callable[..., Any], *arguments: str) -> str | None:
    """Return a problem where a function can't be called with so many arguments."""
    try:
        inspect.signature(function).bind(*arguments)
    except TypeError:
        return f"{field} has to take ({', '.join(arguments)})"
    except ValueError:  # a function in C without a signature
        return None
    return None


def finding_problem(finding: object) -> str | None:
    """Return what is wrong with an object that a check or a reader has yielded as a finding."""
    if not isinstance(finding, Finding):
        return f"{type(finding).__name__}, not Finding"
    if not isinstance(finding.code, str) or not _CODE.fullmatch(finding.code):
        return f"a finding whose code is {finding.code!r}; a code is a short name, such as 'too_long'"
    if finding.severity not in SEVERITIES:
        return f"a finding '{finding.code}' of severity {finding.severity!r}; it is 'error' or 'warning'"
    if not isinstance(finding.message, str) or not finding.message:
        return f"a finding '{finding.code}' whose message is {finding.message!r}; it is a text"
    if problem := _source_problem(finding.source):
        return f"a finding '{finding.code}' whose {problem}"
    return None


def row_problem(row: object) -> str | None:
    """Return what is wrong with an object that a reader has yielded; its values are looked at by `value_problem`."""
    if isinstance(row, Finding):
        return finding_problem(row)
    if not isinstance(row, Row):
        return f"{type(row).__name__}, neither Row nor Finding"
    if problem := _source_problem(row.source):
        return f"a row whose {problem}"
    if not row.source.line:
        return f"a row whose source is {row.source}, line 0; lines count from 1"
    if not isinstance(row.values, Mapping):
        return f"a row at {row.source} whose values are {type(row.values).__name__}, not a mapping of columns"
    if odd := [name for name in row.values if not isinstance(name, str)]:
        return f"a row at {row.source} with a column named {odd[0]!r}, which is no text"
    return None


def _source_problem(source: object) -> str | None:
    if not isinstance(source, Source):
        return f"source is {type(source).__name__}, not Source"
    if not isinstance(source.path, str) or not source.path:
        return f"source's path is {source.path!r}, and has to be a text: str(path)"
    if not isinstance(source.line, int) or isinstance(source.line, bool) or source.line < 0:
        return f"source's line is {source.line!r}, and has to be a whole number, 0 for the whole source"
    return None


def value_problem(value: object, where: str) -> str | None:
    """Return the first value within a row's that is none of JSON's.

    Args:
        where: the column.
    """
    if value is None or isinstance(value, str | bool | int):
        return None
    if isinstance(value, float):
        return None if math.isfinite(value) else f"{where} is {value!r}, which JSON has not; None is null"
    if isinstance(value, Mapping):
        parts = {f"{where}.{key}": part for key, part in value.items()}
    elif isinstance(value, list | tuple):
        parts = {f"{where}[{index}]": part for index, part in enumerate(value)}
    else:
        return f"{where} is {type(value).__name__}; a value is a text, a number, true, false, null, a list or a mapping"
    return next((found for name, part in parts.items() if (found := value_problem(part, name))), None)


class SeenSources:
    """Sources of the rows so far, a bit for each line of a path."""

    def __init__(self) -> None:
        self._pages: dict[tuple[str, int], bytearray] = {}

    def is_new(self, source: Source) -> bool:
        """Return whether no row before had this source, and note it."""
        number, line = divmod(source.line, _PAGE_LINES)
        page = self._pages.setdefault((source.path, number), bytearray(_PAGE_LINES // 8))
        index, bit = line >> 3, 1 << (line & 7)
        if page[index] & bit:
            return False
        page[index] |= bit
        return True
