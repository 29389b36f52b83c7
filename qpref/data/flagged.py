"""The rows with findings, with bounded texts, for a page that shows them."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from qpref.data.check import CheckedData, CheckedRows
from qpref.data.example_rows import ExampleRow, responses_of, sides_of
from qpref.data.source import DataSource
from qpref.hooks.checks import text_of
from qpref.hooks.types import Split
from qpref.records import Finding, Message, Row, Source, UnpairedExample

MAX_ROWS, MAX_ROWS_PER_CODE = 400, 50
HEAD_CHARACTERS, TAIL_CHARACTERS = 1400, 600
MAX_TURNS, MAX_RESPONSES, MAX_COLUMNS, MAX_FINDINGS = 12, 8, 24, 12

Texts = tuple[tuple[str, str], ...]
"""Labels and texts: roles, sides or column names."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FlaggedRow:
    """A row with its findings and its texts.

    Attributes:
        prompt, responses: of a row that has records; empty otherwise.
        columns: of a row that has none, as it was read; empty where it could not be parsed.
    """

    split: Split
    source: Source
    findings: tuple[Finding, ...]
    prompt: Texts = ()
    responses: Texts = ()
    columns: Texts = ()


def flagged_rows(checked: CheckedData) -> list[FlaggedRow]:
    """Read the rows with findings again, the training rows first, in the order of their files.

    At most MAX_ROWS_PER_CODE rows of a code, and MAX_ROWS in all, so that a page of them stays small. Many codes share
    the rows evenly, so that a rare one at the end of a file is shown too.
    """
    of_row: dict[Source, list[Finding]] = {}
    for finding in checked.report.findings:
        if finding.source.line:
            of_row.setdefault(finding.source, []).append(finding)
    most = max(1, min(MAX_ROWS_PER_CODE, MAX_ROWS // max(1, len(checked.report.counts))))
    taken: Counter[str] = Counter()
    flagged: list[FlaggedRow] = []
    for rows in checked.splits:
        for source, raw in _flagged_raw_rows(rows, of_row):
            findings = of_row.pop(raw.source)
            if len(flagged) < MAX_ROWS and any(taken[finding.code] < most for finding in findings):
                taken.update({finding.code for finding in findings})
                flagged.append(_flagged(rows.split, source, raw, findings))
    return flagged


def _flagged_raw_rows(rows: CheckedRows, of_row: Mapping[Source, object]) -> Iterator[tuple[DataSource, Row | Finding]]:
    """Yield the raw rows of a split that have findings; stop reading once none is left."""
    for source in rows.sources:
        for raw in rows.raw_rows(source) if of_row else ():
            if raw.source in of_row:
                yield source, raw
            if not of_row:
                break


def _flagged(split: Split, source: DataSource, raw: Row | Finding, findings: Sequence[Finding]) -> FlaggedRow:
    first = tuple(findings[:MAX_FINDINGS])
    if isinstance(raw, Finding):
        return FlaggedRow(split=split, source=raw.source, findings=first)
    records = source.records(raw)
    if isinstance(records, Finding):
        return FlaggedRow(split=split, source=raw.source, findings=first, columns=_columns(raw.values))
    prompt = _turns(records[0].prompt)
    return FlaggedRow(split=split, source=raw.source, findings=first, prompt=prompt, responses=_responses(records))


def _turns(turns: Sequence[Message]) -> Texts:
    shown = tuple((message.role, shortened(text_of([message]))) for message in turns[-MAX_TURNS:])
    left_out = len(turns) - len(shown)
    return ((f"{left_out} earlier turns", "not shown"), *shown) if left_out else shown


def _responses(records: Iterable[ExampleRow]) -> Texts:
    """Label each response of a row by its sides; of ranked responses, one may be chosen and rejected."""
    sides: dict[str, list[str]] = {}
    for record in records:
        for side, turns in zip(_labels(record), responses_of(record), strict=True):
            own = sides.setdefault(text_of(turns), [])
            if side not in own:
                own.append(side)
    shown = [(" and ".join(names), shortened(text)) for text, names in sides.items()][:MAX_RESPONSES]
    left_out = len(sides) - len(shown)
    return (*shown, (f"{left_out} more responses", "not shown")) if left_out else tuple(shown)


def _labels(record: ExampleRow) -> tuple[str, ...]:
    if isinstance(record, UnpairedExample):
        return ("desirable completion" if record.label else "undesirable completion",)
    return sides_of(record)


def _columns(values: Mapping[str, object]) -> Texts:
    shown = [(shortened(name), shortened(_text(value))) for name, value in list(values.items())[:MAX_COLUMNS]]
    left_out = len(values) - len(shown)
    return (*shown, (f"{left_out} more columns", "not shown")) if left_out else tuple(shown)


def _text(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def shortened(text: str) -> str:
    """Keep the start and the end of a long text, and say how much is left out between them."""
    left_out = len(text) - HEAD_CHARACTERS - TAIL_CHARACTERS
    if left_out <= 0:
        return text
    return f"{text[:HEAD_CHARACTERS]}\n[... {left_out:,} characters left out ...]\n{text[-TAIL_CHARACTERS:]}"
