"""Verdicts of one source, watched over all of its rows: those that no outcome has, one-sided ones, and the first three.

A single wrong reading inverts every label of a source, and no row shows it. So a verdict that fits no outcome counts
against the whole source: the others may fit by accident, as does the 1 of a file that counts its responses from 1.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from qpref.data.example_rows import RowRecord
from qpref.data.source import DataSource, Judged
from qpref.recipe.contest_section import number_of
from qpref.records import Finding, Row, Source
from qpref.rows.contest import TIED, UNLISTED, Contest, value_at

FEWEST_VERDICTS = 20
"""Verdicts of which one-sidedness isn't chance: the probability of 20 equal ones is 2 in a million."""
NUM_SHOWN = 3
_MOST_KINDS = 50
_MOST_CHARACTERS = 60


@dataclass(frozen=True, slots=True, kw_only=True)
class ShownVerdict:
    """A row and the response that won, shortened for display.

    Attributes:
        verdict: column and value: `label = 2`.
        winner: column of the response that won.
    """

    source: Source
    verdict: str
    winner: str
    chosen: str
    rejected: str


@dataclass(slots=True)
class VerdictWatch:
    """Tally of the verdicts of one source.

    Attributes:
        shown: the first rows with a winner.
    """

    source: DataSource
    shown: list[ShownVerdict] = field(default_factory=list)
    _path: str = ""
    _winners: Counter[str] = field(default_factory=Counter)
    _unlisted: Counter[str] = field(default_factory=Counter)
    _first_lines: dict[str, int] = field(default_factory=dict)
    _num_ties: int = 0
    _numbers: set[float | None] = field(default_factory=set)
    _contest: Contest | None = None
    _format: str = ""

    def note(self, row: Row, judged: Judged | None, result: Sequence[RowRecord] | Finding) -> None:
        """Count the verdict of a row, and keep the first rows that have a winner."""
        if judged is None or (isinstance(result, Finding) and result.code not in (UNLISTED, TIED)):
            return
        self._format, self._contest, values = judged
        self._path = row.source.path
        if isinstance(result, Finding) and result.code == TIED:
            self._num_ties += 1
            self._numbers.add(self._number(values))
        elif isinstance(result, Finding):
            self._note_unlisted(self._contest.described(values), row.source.line)
        else:
            better, worse = self._contest.sides(values)
            self._winners[better] += 1
            if len(self._numbers) < _MOST_KINDS:
                self._numbers.add(self._number(values))
            if len(self.shown) < NUM_SHOWN:
                chosen, rejected = (_short(value_at(values, side)) for side in (better, worse))
                self.shown.append(
                    ShownVerdict(
                        source=row.source,
                        verdict=self._contest.described(values),
                        winner=better,
                        chosen=chosen,
                        rejected=rejected,
                    )
                )

    def _note_unlisted(self, verdict: str, line: int) -> None:
        if verdict not in self._unlisted and len(self._unlisted) >= _MOST_KINDS:
            verdict = "others"
        self._unlisted[verdict] += 1
        self._first_lines.setdefault(verdict, line)

    def findings(self) -> Iterator[Finding]:
        """Yield the findings about the whole source."""
        if self._contest is None:
            return
        total = self._winners.total()
        if self._unlisted:
            yield self._finding("refused_source", "error", self._unlisted_message(self._contest))
        elif self._counts_from_zero(self._contest):
            message = (
                f"{self._num_ties} verdicts are 0 (a tie) and the other {total} are all for "
                f"{self._contest.section.first}: they may count from 0, where 1 is the second response. Every row of "
                f"the source is refused; if the format {self._format} is right, say so in [data.contest]"
            )
            yield self._finding("refused_source", "error", message)
        elif total >= FEWEST_VERDICTS and len(self._winners) == 1:
            (side,) = self._winners
            message = (
                f"all {total} verdicts are for {side}: right only where the better response is always in that column"
            )
            yield self._finding("one_sided_verdicts", "warning", message)
        section = self._contest.section
        columns = self.source.choice.columns
        renamed = [name for name in (section.first, section.second, *section.verdict_columns) if name in columns]
        if renamed and self.source.choice.contest is None:
            names = ", ".join(f"{columns[name]} as {name}" for name in renamed)
            message = (
                f"{names}: verdicts are read as in the format {self._format}: {self._contest.expected}; "
                "say who won in [data.contest], with the file's own columns"
            )
            yield self._finding("assumed_verdict", "warning", message)

    def _counts_from_zero(self, contest: Contest) -> bool:
        """Return whether a format with 0 for a tie and 1 for the first is read from verdicts that are 0 and 1 alone."""
        if self.source.choice.contest is not None or set(self._winners) != {contest.section.first}:
            return False
        return self._num_ties > 0 and self._numbers == {0, 1}

    def _number(self, values: Mapping[str, object]) -> float | None:
        """Return the verdict of a row as a number; None where it is none, or spread over columns."""
        assert self._contest is not None
        columns = self._contest.section.verdict_columns
        return number_of(value_at(values, columns[0])) if len(columns) == 1 else None

    def _unlisted_message(self, contest: Contest) -> str:
        count = self._unlisted.total()
        kinds = [
            f"{verdict} ({number} {'row' if number == 1 else 'rows'}, first: {self._first_lines[verdict]})"
            for verdict, number in self._unlisted.most_common(5)
        ]
        more = f" and {len(self._unlisted) - 5} more" if len(self._unlisted) > 5 else ""
        if self.source.choice.contest is not None:
            advice = "list it in first_wins, second_wins or tie of [data.contest]"
        else:
            advice = f"these aren't data in the format {self._format}, so say who won in [data.contest]"
        return (
            f"{count} of {count + self._winners.total()} verdicts fit no outcome: {', '.join(kinds)}{more}; expected "
            f"{contest.expected}. Every row of the source is refused, since the rest may be inverted; {advice}"
        )

    def _finding(self, code: str, severity: Literal["error", "warning"], message: str) -> Finding:
        return Finding(code=code, severity=severity, message=message, source=Source(path=self._path, line=0))


def _short(value: object) -> str:
    """Return the start of a response on one line: a text, or the last message of a conversation."""
    while isinstance(value, list) and value:
        value = value[-1]
    if isinstance(value, dict):
        value = value.get("content", value.get("value", value))
    text = " ".join(str(value)[: 4 * _MOST_CHARACTERS].split())
    text = "".join(character if character.isprintable() else "\N{REPLACEMENT CHARACTER}" for character in text)
    return text if len(text) <= _MOST_CHARACTERS else text[: _MOST_CHARACTERS - 1] + "…"
