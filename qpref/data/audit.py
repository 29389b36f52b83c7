"""A data set looked at as a whole, without training on it and without a model's weights: what `qpref check` shows."""

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
    """What was seen.

    Attributes:
        first_row: the first kept row as the model meets it; None where no tokenizer was at hand.
    """

    checked: CheckedData
    first_row: str | None = None

    @property
    def why_empty(self) -> list[str]:
        """Of each split of which nothing is left, why."""
        splits = (self.checked.train, self.checked.heldout)
        return [rows.why_empty for rows in splits if rows is not None and rows.is_empty]

    def facts(self) -> dict[str, Any]:
        """All of it as JSON data."""
        return self.checked.report.facts() | {"first_row": self.first_row}


def audit_data(
    checked: CheckedData,
    data: DataSection,
    tokenizer: PairTokenizer | None,
    note: Callable[[TokenizedExample], None] | None = None,
) -> Audit:
    """Tokenize checked data, where there is a tokenizer, and keep nothing but what is told.

    Args:
        note: is shown each tokenized example.
    """
    seen = Audit(checked)
    for rows in (checked.heldout, checked.train):
        if rows is None or tokenizer is None:
            continue
        seen.first_row = None
        for example in tokenized(rows, tokenizer, data):
            seen.first_row = seen.first_row or tokenizer.render_first(example)
            if note is not None:
                note(example)
    return seen
