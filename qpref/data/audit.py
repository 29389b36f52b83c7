"""Audit of a data set for `qpref check`: checks and token lengths, without training and without model weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from qpref.data.check import CheckedData
from qpref.data.load import tokenized
from qpref.data.tokenize import PairTokenizer
from qpref.recipe.data_section import DataSection
from qpref.records import TokenizedExample


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
