"""Parts of a response that don't count: character spans from the marks of a message and from a row's own columns.

Axolotl's `train` and `train_detail` are read as they are there: the end of a detail is its last character, and in a
message with details the characters of none don't count.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from qpref.records import Message, Spans
from qpref.rows.values import BadRowError, json_value, kind_of, shown

MASK_COLUMNS = {"chosen_masked": "chosen", "rejected_masked": "rejected", "completion_masked": "completion"}
"""Column with the masked spans of a response -> the response."""
PREFIX_COLUMN = "response_prefix"
"""Column with the text that all responses of the row begin with."""
EVERYTHING: Spans = ((0, 2**62),)
"""Span of a message with `train` false: calls and reasoning don't count either."""


def masked_in(turn: Mapping[str, object], num_characters: int, of_parts: Spans, where: str) -> Spans:
    """Collect the masked spans of a message's content.

    Args:
        num_characters: length of the content.
        of_parts: spans of the content's parts with `train` false.

    Raises:
        BadRowError: a mark is malformed, or a span lies outside the content.
    """
    spans = list(of_parts)
    if (masked := turn.get("masked")) is not None:
        spans += spans_in(masked, num_characters, f"{where}, masked")
    if (details := turn.get("train_detail")) is not None:
        spans += _outside_details(details, num_characters, f"{where}, train_detail")
    return EVERYTHING if not is_trained(turn, where) else joined(spans)


def is_trained(values: Mapping[str, object], where: str) -> bool:
    """Return the mark `train` of a message or a part; True without one."""
    mark = values.get("train")
    if mark is not None and not isinstance(mark, bool):
        raise BadRowError("bad_mask", f"{where}: train is true or false, found {shown(mark)}")
    return mark is not False


def spans_in(value: object, num_characters: int, where: str) -> Spans:
    """Parse `[[start, end], ...]`: characters from 0, `end` is the first one after the span; or the JSON text of it."""
    listed = json_value(value) if isinstance(value, str) else value
    if not isinstance(listed, list):
        raise BadRowError("bad_mask", f"{where}: expected [[start, end], ...], found {kind_of(value)}")
    spans = []
    for span in listed:
        if not isinstance(span, list) or len(span) != 2 or not all(type(at) is int for at in span):
            raise BadRowError("bad_mask", f"{where}: expected [start, end] in characters, found {_shown(span)}")
        start, end = span
        if not 0 <= start < end <= num_characters:
            raise BadRowError("bad_mask", f"{where}: {span} is no span of a text of {num_characters} characters")
        spans.append((start, end))
    return tuple(spans)


def _shown(span: object) -> str:
    """Show a malformed span; a mask of one number a token, as TRL has it, is a frequent one."""
    if span in (0, 1):
        return f"{span!r}: a mask of tokens fits one tokenizer alone, so masks are spans of the text"
    return f"{span}"[:40] if isinstance(span, list) else shown(span)


def _outside_details(details: object, num_characters: int, where: str) -> Spans:
    """Return the spans that no detail trains."""
    if not isinstance(details, list) or not all(isinstance(each, dict) for each in details):
        raise BadRowError("bad_mask", f"{where}: expected a list of objects, found {kind_of(details)}")
    counts = bytearray(num_characters)
    for each in details:
        start, last, train = (each.get(name) for name in ("begin_offset", "end_offset", "train"))
        if type(start) is not int or type(last) is not int or not isinstance(train, bool):
            raise BadRowError(
                "bad_mask", f"{where}: a detail has begin_offset, end_offset and train, found {each}"[:200]
            )
        if not 0 <= start <= last < num_characters:
            message = f"{where}: {start} to {last} aren't characters of a text of {num_characters}"
            raise BadRowError("bad_mask", f"{message}; the first is 0, and end_offset is the last one")
        counts[start : last + 1] = bytes([train]) * (last + 1 - start)
    return tuple((at, at + 1) for at, counted in enumerate(counts) if not counted)


def joined(spans: Sequence[tuple[int, int]]) -> Spans:
    """Sort spans and join those that touch or overlap."""
    found: list[tuple[int, int]] = []
    for start, end in sorted(spans):
        if found and start <= found[-1][1]:
            found[-1] = found[-1][0], max(end, found[-1][1])
        else:
            found.append((start, end))
    return tuple(found)


def marked(values: Mapping[str, object], response: Message, side: str) -> Message:
    """Apply a row's columns to a response: the prefix that responses begin with, and the masked spans of this side.

    Spans are those of the side's own text, without the prefix.

    Raises:
        BadRowError: nothing of the response counts, or a span lies outside its text.
    """
    column = f"{side}_masked"
    if values.get(column) is not None:
        spans = joined([*response.masked, *spans_in(values[column], len(response.content), column)])
        response = replace(response, masked=spans)
    _refuse_all_masked(response, side)
    prefix = values.get(PREFIX_COLUMN)
    if prefix not in (None, ""):
        if not isinstance(prefix, str):
            raise BadRowError("bad_mask", f"{PREFIX_COLUMN}: expected a text, found {kind_of(prefix)}")
        shifted = [(start + len(prefix), end + len(prefix)) for start, end in response.masked]
        response = replace(response, content=prefix + response.content, masked=joined([(0, len(prefix)), *shifted]))
    return response


def _refuse_all_masked(response: Message, side: str) -> None:
    counted = list(response.content)
    for start, end in response.masked:
        counted[start:end] = " " * (min(end, len(counted)) - start)
    others = response.extra.keys() & {"tool_calls", "reasoning_content"}
    if response.masked == EVERYTHING or (response.masked and not "".join(counted).strip() and not others):
        raise BadRowError("masked", f"{side}: the whole response is masked, so that nothing of it counts")


def refuse_shared_mask(values: Mapping[str, object], num_records: int) -> None:
    """Refuse a column of masked spans in a row that has several responses of a side: it is unclear whose they are."""
    found = [name for name in MASK_COLUMNS if values.get(name) is not None]
    if found and num_records > 1:
        message = f"{found[0]}: the row has several responses; put `masked` into the message of each"
        raise BadRowError("bad_mask", message)
