"""The page's data section: the counts, findings and length histograms of data.json, as tables and bars."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qpref.report.cells import MAX_ROWS, Fields, Table, cell, cell_text, label_of
from qpref.report.read import number
from qpref.report.tables import Bar
from qpref.report.text import count_text, share_text

COUNTS = ("read", "kept", "refused", "dropped", "cut", "repeated")
COUNTED, FINDINGS, NOT_LISTED, LENGTHS = "counts", "findings", "findings_not_listed", "lengths"
EXAMPLES = 5
"""Findings shown per code."""
SEVERITIES = ("error", "warning")
PARTS = ("prompt", "chosen", "rejected", "completion")

Kind = tuple[str, str]
"""A finding's severity and code."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DataTables:
    """Contents of the data section.

    Attributes:
        counts: of rows: label, number, and share of the rows read.
        findings: by severity and code: their number and the first few.
        histograms: of lengths: title and bars.
        others: the file's other values.
    """

    counts: list[tuple[str, str, str]]
    findings: Table | None
    histograms: list[tuple[str, list[Bar]]]
    others: Fields | None


def data_tables(data: Mapping[str, Any]) -> DataTables:
    """Lay out the contents of data.json."""
    lengths = data.get(LENGTHS)
    named = sorted(lengths.items(), key=_rank_of_length)[:MAX_ROWS] if isinstance(lengths, dict) else []
    histograms = [(label_of(name), bars) for name, value in named if (bars := _bars(value))]
    known = {*COUNTS, COUNTED, FINDINGS, NOT_LISTED, *([LENGTHS] if histograms else [])}
    others = {name: value for name, value in data.items() if name not in known and value not in (None, [], {})}
    return DataTables(
        counts=_counts(data),
        findings=_findings(data.get(FINDINGS), data.get(COUNTED)),
        histograms=histograms,
        others=Fields([(label_of(name), cell(value)) for name, value in list(others.items())[:MAX_ROWS]])
        if others
        else None,
    )


def _counts(data: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    read = number(data.get("read"))
    counts = []
    for name in COUNTS:
        value = number(data.get(name))
        if not math.isnan(value):
            share = share_text(value / read) if read > 0 and name != "read" else ""
            counts.append((name, count_text(value), share))
    return counts


def _findings(findings: Any, counted: Any) -> Table | None:
    """Tabulate the first findings of each code with the code's total, which may exceed the findings in the file."""
    if not isinstance(findings, list):
        return None
    groups: dict[Kind, list[Mapping[str, Any]]] = {}
    for finding in findings:
        if isinstance(finding, dict):
            groups.setdefault(_kind(finding), []).append(finding)
    totals = {kind: float(len(group)) for kind, group in groups.items()}
    for count in counted if isinstance(counted, list) else []:
        if isinstance(count, dict) and _kind(count) in totals:
            totals[_kind(count)] = max(totals[_kind(count)], number(count.get("count")))
    rows = []
    for kind in sorted(groups, key=lambda kind: (_rank(kind[0]), -totals[kind], kind[1]))[:MAX_ROWS]:
        for index, finding in enumerate(groups[kind][:EXAMPLES]):
            first = [*kind, count_text(totals[kind])] if index == 0 else ["", "", ""]
            rows.append([*first, _location(finding), cell_text(finding.get("message"))])
        if totals[kind] > EXAMPLES:
            rows.append(["", "", "", f"and {count_text(totals[kind] - EXAMPLES)} more", ""])
    return Table(["severity", "code", "rows", "location", "message"], rows)


def _kind(finding: Mapping[str, Any]) -> Kind:
    return cell_text(finding.get("severity")), cell_text(finding.get("code"))


def _rank(severity: str) -> int:
    return SEVERITIES.index(severity) if severity in SEVERITIES else len(SEVERITIES)


def _location(finding: Mapping[str, Any]) -> str:
    path, line = finding.get("path"), finding.get("line")
    if path is None:
        return ""
    return cell_text(path) if line is None else f"{cell_text(path)}:{cell_text(line).replace(',', '')}"


def _rank_of_length(item: tuple[str, Any]) -> tuple[bool, int]:
    """Order as `qpref check` does: characters before tokens, and the difference last; data.json is sorted by name."""
    part, _, unit = item[0].rpartition(" ")
    return unit == "tokens", PARTS.index(part) if part in PARTS else len(PARTS)


def _bars(histogram: Any) -> list[Bar]:
    """Draw the bars of `[{from, to, count}]`; none where the value has another form."""
    if not isinstance(histogram, list) or not all(isinstance(bar, dict) for bar in histogram):
        return []
    bins = [(number(bar.get("from")), number(bar.get("to")), number(bar.get("count"))) for bar in histogram]
    if any(math.isnan(value) for bar in bins for value in bar) or any(count < 0 for _, _, count in bins):
        return []
    most = max((count for _, _, count in bins), default=0.0) or 1.0
    return [
        Bar(
            title=count_text(low) if low == high else f"{count_text(low)} to {count_text(high)}",
            value=count_text(count),
            parts=[(count / most, 0, "")],
        )
        for low, high, count in bins[:MAX_ROWS]
    ]
