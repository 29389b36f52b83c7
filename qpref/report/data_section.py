"""data.json, what the data checks found, as tables and bars."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qpref.report.facts import Facts, Table, cell_text, shown, words
from qpref.report.read import number
from qpref.report.tables import Bar
from qpref.report.text import count_text, share_text

COUNTS = ("read", "kept", "refused", "dropped", "cut", "repeated")
COUNTED, FINDINGS, NOT_LISTED, LENGTHS = "counts", "findings", "findings_not_listed", "lengths"
EXAMPLES = 5
"""Findings of a code that are shown in full."""
SEVERITIES = ("error", "warning")

Kind = tuple[str, str]
"""A finding's severity and code."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DataReport:
    """What became of the rows.

    Attributes:
        counts: of rows: what became of them, how many, and as a share of those that were read.
        findings: by severity and code: how many, and the first few.
        histograms: of lengths: what was measured, and its bars.
        others: what else the file says.
    """

    counts: list[tuple[str, str, str]]
    findings: Table | None
    histograms: list[tuple[str, list[Bar]]]
    others: Facts | None


def data_report(data: Mapping[str, Any]) -> DataReport:
    lengths = data.get(LENGTHS)
    drawn = [(str(name), bars) for name, value in lengths.items() if (bars := _bars(value))] if isinstance(
        lengths, dict) else []  # fmt: skip
    known = {*COUNTS, COUNTED, FINDINGS, NOT_LISTED, *([LENGTHS] if drawn else [])}
    others = {name: value for name, value in data.items() if name not in known and value not in (None, [], {})}
    return DataReport(
        counts=_counts(data),
        findings=_findings(data.get(FINDINGS), data.get(COUNTED)),
        histograms=drawn,
        others=Facts([(words(name), shown(value)) for name, value in others.items()]) if others else None,
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
    """The first findings of each code under its number, which may be larger than that of the findings in the file."""
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
    for kind in sorted(groups, key=lambda kind: (_rank(kind[0]), -totals[kind], kind[1])):
        for place, finding in enumerate(groups[kind][:EXAMPLES]):
            first = [*kind, count_text(totals[kind])] if place == 0 else ["", "", ""]
            rows.append([*first, _where(finding), cell_text(finding.get("message"))])
        if totals[kind] > EXAMPLES:
            rows.append(["", "", "", f"and {count_text(totals[kind] - EXAMPLES)} more", ""])
    return Table(["severity", "code", "rows", "where", "what"], rows)


def _kind(finding: Mapping[str, Any]) -> Kind:
    return cell_text(finding.get("severity")), cell_text(finding.get("code"))


def _rank(severity: str) -> int:
    return SEVERITIES.index(severity) if severity in SEVERITIES else len(SEVERITIES)


def _where(finding: Mapping[str, Any]) -> str:
    path, line = finding.get("path"), finding.get("line")
    if path is None:
        return ""
    return cell_text(path) if line is None else f"{cell_text(path)}:{cell_text(line).replace(',', '')}"


def _bars(histogram: Any) -> list[Bar]:
    """Bars of `[{from, to, count}]`; none where it is something else."""
    if not isinstance(histogram, list) or not all(isinstance(bar, dict) for bar in histogram):
        return []
    ends = [(number(bar.get("from")), number(bar.get("to")), number(bar.get("count"))) for bar in histogram]
    if any(math.isnan(end) for bar in ends for end in bar) or any(size < 0 for _, _, size in ends):
        return []
    most = max((size for _, _, size in ends), default=0.0) or 1.0
    return [
        Bar(
            title=count_text(low) if low == high else f"{count_text(low)} to {count_text(high)}",
            value=count_text(size),
            parts=[(size / most, 0, "")],
        )
        for low, high, size in ends
    ]
