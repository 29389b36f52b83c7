"""Render the findings of `qpref check` as a page: codes with their remedies, flagged rows with their texts, lengths."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from qpref.data.audit import Audit
from qpref.data.data_report import DataReport
from qpref.data.finding_codes import Explanation, explanation_of
from qpref.data.flagged import FlaggedRow, Texts, flagged_rows
from qpref.data.verdicts import ShownVerdict
from qpref.records import Finding
from qpref.report.data_section import Kind, data_tables
from qpref.report.frame import render_page, write_page
from qpref.report.text import visible

MAX_SOURCES, MAX_CODES, MAX_SOURCE_FINDINGS, MAX_VERDICTS, MAX_MESSAGE = 20, 100, 100, 30, 600
SPLITS = {"train": "training", "heldout": "held-out"}
SEVERITIES = ("error", "warning")


@dataclass(frozen=True, slots=True, kw_only=True)
class CodeSummary:
    """A code of one severity.

    Attributes:
        count: of its findings.
        num_shown: rows with it that the page shows.
        is_complete: the page shows all of its rows.
    """

    code: str
    severity: str
    count: int
    num_shown: int
    is_complete: bool
    explanation: Explanation


@dataclass(frozen=True, slots=True, kw_only=True)
class RowCard:
    """A flagged row as the page shows it.

    Attributes:
        codes, severities: JSON lists, for the filters.
        findings: severity, code and message.
    """

    split: str
    location: str
    codes: str
    severities: str
    findings: list[tuple[str, str, str]]
    prompt: Texts
    responses: Texts
    columns: Texts


def write_check_page(audit: Audit, path: Path, title: str) -> None:
    """Write the page of an audit; an existing file is replaced.

    Args:
        title: name of the recipe or of the data.
    """
    write_page(path, render_check_page(audit, title))


def render_check_page(audit: Audit, title: str) -> str:
    """Render the page as HTML; reads the flagged rows again."""
    report = audit.checked.report
    rows = flagged_rows(audit.checked)
    names = _short_names([*report.paths, *(row.source.path for row in rows)])
    summaries, source_findings = _summaries(report, rows), _source_findings(report, names)
    facts = audit.facts()
    del facts["first_row"], facts["sources"], facts["verdicts"]
    return render_page(
        "check.html.j2",
        script="check.js",
        styles=["check.css"],
        title=visible(title),
        command="check",
        origin="the data",
        report=report,
        paths=[visible(path) for path in report.paths[:MAX_SOURCES]],
        sources_left_out=max(0, len(report.paths) - MAX_SOURCES),
        why_empty=audit.why_empty,
        summaries=summaries[:MAX_CODES],
        codes_left_out=max(0, len(summaries) - MAX_CODES),
        source_findings=source_findings[:MAX_SOURCE_FINDINGS],
        source_findings_left_out=max(0, len(source_findings) - MAX_SOURCE_FINDINGS),
        verdicts=[_verdict(verdict, names) for verdict in report.verdicts[:MAX_VERDICTS]],
        verdicts_left_out=max(0, len(report.verdicts) - MAX_VERDICTS),
        rows=[_card(row, names) for row in rows],
        splits=[SPLITS[split] for split in SPLITS if any(row.split == split for row in rows)],
        severities=[severity for severity in SEVERITIES if any(one.severity == severity for one in summaries)],
        codes=sorted({visible(finding.code) for row in rows for finding in row.findings}),
        data=data_tables(facts),
        first_row=None if audit.first_row is None else visible(audit.first_row),
    )


def _summaries(report: DataReport, rows: Sequence[FlaggedRow]) -> list[CodeSummary]:
    """Summarize the codes, errors first, the most frequent first."""
    listed: Counter[Kind] = Counter((finding.severity, finding.code) for finding in report.findings)
    flagged, shown = _num_rows(report.findings), _num_rows(finding for row in rows for finding in row.findings)
    ordered = sorted(report.counts.items(), key=lambda item: (SEVERITIES.index(item[0][0]), -item[1], item[0][1]))
    return [
        CodeSummary(
            code=visible(kind[1]),
            severity=kind[0],
            count=count,
            num_shown=shown[kind],
            is_complete=count == listed[kind] and flagged[kind] == shown[kind],
            explanation=explanation_of(kind[1]),
        )
        for kind, count in ordered
    ]


def _num_rows(findings: Iterable[Finding]) -> Counter[Kind]:
    """Count the rows with each kind of finding."""
    located = {(finding.severity, finding.code, finding.source) for finding in findings if finding.source.line}
    return Counter((severity, code) for severity, code, _ in located)


def _source_findings(report: DataReport, names: dict[str, str]) -> list[tuple[str, str, str]]:
    """Collect the findings of whole sources: severity, code, and message with the source."""
    return [
        (finding.severity, visible(finding.code), f"{_name(finding.source.path, names)}: {_message(finding)}")
        for finding in report.findings
        if not finding.source.line
    ]


def _verdict(verdict: ShownVerdict, names: dict[str, str]) -> tuple[str, str, Texts]:
    """Lay out a row of a comparison: its location, what it says of the winner, and the two responses."""
    location = f"{_name(verdict.source.path, names)}, line {verdict.source.line}"
    sides = (("chosen", verdict.chosen), ("rejected", verdict.rejected))
    return location, visible(f"{verdict.verdict}: {verdict.winner} won"), _visible(sides)


def _card(row: FlaggedRow, names: dict[str, str]) -> RowCard:
    return RowCard(
        split=SPLITS[row.split],
        location=f"{_name(row.source.path, names)}, line {row.source.line}",
        codes=json.dumps(sorted({visible(finding.code) for finding in row.findings})),
        severities=json.dumps(sorted({finding.severity for finding in row.findings})),
        findings=[(finding.severity, visible(finding.code), _message(finding)) for finding in row.findings],
        prompt=_visible(row.prompt),
        responses=_visible(row.responses),
        columns=_visible(row.columns),
    )


def _visible(texts: Texts) -> Texts:
    return tuple((visible(label), visible(text)) for label, text in texts)


def _message(finding: Finding) -> str:
    text = finding.message
    return visible(text if len(text) <= MAX_MESSAGE else f"{text[:MAX_MESSAGE]} [...]")


def _short_names(paths: Sequence[str]) -> dict[str, str]:
    """Map each path to its file's name where no other path has it."""
    unique = dict.fromkeys(paths)
    names = Counter(Path(path).name for path in unique)
    return {path: Path(path).name if names[Path(path).name] == 1 else path for path in unique}


def _name(path: str, names: dict[str, str]) -> str:
    return visible(names.get(path) or path)
