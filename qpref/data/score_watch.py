"""Scores and ranks of one source that contradict its labels: one warning for each of them, with the rows."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from qpref.data.example_rows import RowRecord
from qpref.data.source import DataSource, Judged
from qpref.records import Finding, PreferencePair, Row, Source
from qpref.rows.contest import value_at
from qpref.rows.contest_formats import CONTESTS, contest_format, may_compare
from qpref.rows.score_columns import differences, has_scores, orders_of, side_scores
from qpref.rows.values import BadRowError

NUM_LINES = 10
SIDE_VERDICTS = frozenset({"winner", "verdict", "preference", "preferred", "better", "choice", "label"})
"""Columns that may name a side."""
SWAPPED_SHARE = 0.5
"""Share of contradicting rows above which the whole source looks swapped, and not single rows."""

_TEXTS = {"prompt", "chosen", "rejected", "system"}
"""Columns beside which a row of texts has no score."""


@dataclass(slots=True)
class ScoreWatch:
    """Count the rows of one source whose scores say that the rejected response is the better one."""

    source: DataSource
    _path: str = ""
    _seen: Counter[str] = field(default_factory=Counter)
    _lines: dict[str, list[int]] = field(default_factory=dict)
    _against: Counter[str] = field(default_factory=Counter)

    def note(self, row: Row, judged: Judged | None, result: Sequence[RowRecord] | Finding) -> None:
        """Compare the label of a row with its other columns."""
        if isinstance(result, Finding) or not isinstance(result[0], PreferencePair):
            return
        if row.values.keys() <= _TEXTS and all(isinstance(value, str) for value in row.values.values()):
            return
        self._path = row.source.path
        for text, contradicts in self._evidence(row, judged):
            self._seen[text] += 1
            if contradicts:
                self._against[text] += 1
                lines = self._lines.setdefault(text, [])
                if len(lines) < NUM_LINES:
                    lines.append(row.source.line)

    def findings(self) -> Iterator[Finding]:
        """Yield a warning for each pair of columns that contradicts the labels."""
        for text, count in self._against.items():
            total = self._seen[text]
            lines = ", ".join(map(str, self._lines[text])) + (", ..." if count > NUM_LINES else "")
            swapped = "; are the two sides swapped?" if total > 1 and count > SWAPPED_SHARE * total else ""
            message = f"{text} in {count} of {total} rows ({'line' if count == 1 else 'lines'} {lines}){swapped}"
            source = Source(path=self._path, line=0)
            yield Finding(code="swapped_score", severity="warning", message=message, source=source)

    def _evidence(self, row: Row, judged: Judged | None) -> Iterator[tuple[str, bool]]:
        """Yield the columns that a row's label is compared with, as a text, and whether they contradict it."""
        values, better, worse, exclude = self.source.sides_of(row, judged)
        if not self._may_contradict(values, better, worse):
            return
        if better not in values and worse not in values:
            yield from _contradicting_orders(self.source.named_values(row))
        for names, high, low in side_scores(values, better, worse, exclude):
            yield f"the label contradicts {names}", high < low
        if exclude:
            return  # a difference's sign would be that of the columns, not of the sides
        for name, difference in differences(values):
            yield f"{name} is below 0", difference < 0
        yield from _contradicting_verdict(values, better, worse)

    @staticmethod
    def _may_contradict(values: Mapping[str, object], better: str, worse: str) -> bool:
        """Return whether a row has more than texts to compare; most have not, and this is the quick way to know."""
        columns = tuple(values)
        is_nested = any(isinstance(value, dict | list) for value in values.values())
        is_judged = may_compare(columns) or not SIDE_VERDICTS.isdisjoint(columns)
        return is_nested or is_judged or has_scores(columns, better, worse)


def _contradicting_orders(values: Mapping[str, object]) -> Iterator[tuple[str, bool]]:
    (used, scores), *others = [*orders_of(values).items()] or [("", [])]
    for name, other in others:
        pairs = itertools.combinations(zip(scores, other, strict=True), 2)
        yield (
            f"the order by {used} contradicts {name}",
            any((one[0] - two[0]) * (one[1] - two[1]) < 0 for one, two in pairs),
        )


def _contradicting_verdict(values: Mapping[str, object], better: str, worse: str) -> Iterator[tuple[str, bool]]:
    """Compare `chosen` with a verdict that the row has too: `rejected`, or the winner of a comparison."""
    for column in SIDE_VERDICTS & values.keys():
        text = values[column]
        side = text.strip().lower() if isinstance(text, str) else None
        if side in ("chosen", "rejected"):
            yield f"the label contradicts {column}", side == "rejected"
    if not may_compare(tuple(values)):
        return
    name = contest_format(values, {name for name, value in values.items() if value is not None})
    if name is None:
        return
    try:
        winner, _ = CONTESTS[name].sides(values)
    except BadRowError:
        return
    if value_at(values, winner) in (values.get(better), values.get(worse)):
        columns = " and ".join(CONTESTS[name].section.verdict_columns)
        yield f"the label contradicts {columns}", value_at(values, winner) == values.get(worse)
