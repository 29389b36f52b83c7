"""data.json, what the data checks found, as tables and bars."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from qpref.report.facts import Facts, Table, cell_text, shown, words
from qpref.report.read import number
from qpref.report.tables import Bar
from qpref.report.text import count_text, number_text, share_text

COUNTS = ("read", "kept", "refused")
FINDINGS, HISTOGRAMS = "findings", "histograms"
EXAMPLES = 5
"""Findings of a code that are shown in full."""
SEVERITIES = ("error", "warn", "warning", "info")


@dataclass(frozen=True, slots=True, kw_only=True)
class DataReport:
    """What became of the rows.

    Attributes:
        counts: rows read, kept and refused, as far as they are known.
        findings: by severity and code: how many, and the first few.
        histograms: name and bars each.
        others: what else the file says.
    """

    counts: list[tuple[str, str, str]]
    findings: Table | None
    histograms: list[tuple[str, list[Bar]]]
    others: Facts | None


def data_report(data: Mapping[str, Any]) -> DataReport:
    histograms = data.get(HISTOGRAMS)
    drawn = {}
    if isinstance(histograms, dict):
        drawn = {words(name): bars for name, value in histograms.items() if (bars := _bars(value))}
    known = {*COUNTS, FINDINGS, *([HISTOGRAMS] if drawn else [])}
    others = {name: value for name, value in data.items() if name not in known}
    return DataReport(
        counts=_counts(data),
        findings=_findings(data.get(FINDINGS)),
        histograms=list(drawn.items()),
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


def _findings(findings: Any) -> Table | None:
    if not isinstance(findings, list):
        return None
    groups: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for finding in findings:
        if isinstance(finding, dict):
            kind = cell_text(finding.get("severity")), cell_text(finding.get("code"))
            groups.setdefault(kind, []).append(finding)
    rows = []
    for severity, code in sorted(groups, key=lambda kind: (_rank(kind[0]), -len(groups[kind]), kind[1])):
        group = groups[severity, code]
        rows += [
            [severity if first else "", code if first else "", count_text(len(group)) if first else "", where, message]
            for first, where, message in _examples(group)
        ]
        if len(group) > EXAMPLES:
            rows.append(["", "", "", f"and {len(group) - EXAMPLES:,} more", ""])
    return Table(["severity", "code", "rows", "where", "what"], rows)


def _rank(severity: str) -> int:
    return SEVERITIES.index(severity) if severity in SEVERITIES else len(SEVERITIES)


def _examples(group: list[Mapping[str, Any]]) -> list[tuple[bool, str, str]]:
    found = []
    for place, finding in enumerate(group[:EXAMPLES]):
        path, line = finding.get("path"), finding.get("line")
        where = cell_text(path) + ("" if line is None else f":{cell_text(line).replace(',', '')}")
        found.append((place == 0, where if path is not None else "", cell_text(finding.get("message"))))
    return found


def _bars(histogram: Any) -> list[Bar]:
    """Bars of `{label: count}`, or of `{edges: [...], counts: [...]}` whose edges are one more than its counts."""
    if not isinstance(histogram, dict):
        return []
    counts, edges = histogram.get("counts"), histogram.get("edges") or histogram.get("bins")
    if isinstance(counts, list) and isinstance(edges, list) and len(edges) in (len(counts), len(counts) + 1):
        texts = [number_text(number(edge)) for edge in edges]
        between = [f"{low} to {high}" for low, high in pairwise(texts)]
        pairs = list(zip(between if len(edges) > len(counts) else texts, counts, strict=True))
    else:
        pairs = list(histogram.items())
    sizes = [(str(label), number(count)) for label, count in pairs]
    if not sizes or any(math.isnan(size) or size < 0 for _, size in sizes):
        return []
    most = max(size for _, size in sizes) or 1.0
    return [Bar(title=label, value=count_text(size), parts=[(size / most, 0, "")]) for label, size in sizes]
