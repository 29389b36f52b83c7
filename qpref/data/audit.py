"""Audit of a data set for `qpref check`: checks and token lengths, without training and without model weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from qpref.data.check import CheckedData
from qpref.data.load import tokenized
from qpref.data.tokenize import PairTokenizer
from qpref.recipe.data_section import DataSection
from qpref.records import Finding, TokenizedExample


@dataclass(frozen=True, slots=True, kw_only=True)
class DataCheck:
    """The result of `qpref check`: read = kept + refused + dropped.

    Attributes:
        counts: (severity, code) -> number of findings.
        findings: the first 1,000 of each code and file.
        first_row: text of the first kept row as the model sees it; None without a tokenizer.
        why_empty: reasons for each split of which no row is left.
        facts: all of it as JSON data, with the lengths and the verdicts of comparisons.
    """

    sources: tuple[str, ...]
    read: int
    kept: int
    refused: int
    dropped: int
    counts: Mapping[tuple[str, str], int]
    findings: tuple[Finding, ...]
    first_row: str | None
    why_empty: tuple[str, ...]
    facts: Mapping[str, Any]

    @property
    def passed(self) -> bool:
        """True where no row is refused, and each split has one: the command exits with 0."""
        return not (self.refused or self.why_empty)

    def as_json(self) -> dict[str, Any]:
        """Convert the result to JSON values."""
        return dict(self.facts)


@dataclass(slots=True)
class Audit:
    """Result of an audit.

    Attributes:
        first_row: text of the first kept row as the model sees it; None without a tokenizer.
    """

    checked: CheckedData
    first_row: str | None = None

    @property
    def why_empty(self) -> list[str]:
        """Reasons for each split of which no row is left."""
        splits = (self.checked.train, self.checked.heldout)
        return [rows.why_empty for rows in splits if rows is not None and rows.is_empty]

    def facts(self) -> dict[str, Any]:
        """Return the audit as JSON data."""
        return self.checked.report.facts() | {"first_row": self.first_row}

    def summary(self) -> DataCheck:
        """Return the audit as a record."""
        report = self.checked.report
        return DataCheck(
            sources=report.paths,
            read=report.read,
            kept=report.kept,
            refused=report.refused,
            dropped=report.dropped,
            counts=dict(report.counts),
            findings=tuple(report.findings),
            first_row=self.first_row,
            why_empty=tuple(self.why_empty),
            facts=self.facts(),
        )


def audit_data(
    checked: CheckedData,
    data: DataSection,
    tokenizer: PairTokenizer | None,
    note: Callable[[TokenizedExample], None] | None = None,
) -> Audit:
    """Tokenize checked data, if there is a tokenizer, and add token lengths and findings to its report.

    Args:
        note: called with each tokenized example.
    """
    audit = Audit(checked)
    for rows in (checked.heldout, checked.train):
        if rows is None or tokenizer is None:
            continue
        audit.first_row = None
        for example in tokenized(rows, tokenizer, data):
            audit.first_row = audit.first_row or tokenizer.render_first(example)
            if note is not None:
                note(example)
    return audit
