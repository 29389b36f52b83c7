"""Labels of all sources of a data set, watched row by row: their verdicts, and the scores beside them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from qpref.data.data_report import DataReport
from qpref.data.example_rows import RowRecord
from qpref.data.score_watch import ScoreWatch
from qpref.data.source import DataSource
from qpref.data.verdicts import VerdictWatch
from qpref.records import Finding, Row


class LabelWatch:
    """Watch the labels of several sources; their rows may come in any order."""

    def __init__(self, sources: Iterable[DataSource]) -> None:
        self._of = {source.choice.location: (VerdictWatch(source), ScoreWatch(source)) for source in sources}

    def note(self, source: DataSource, row: Row, result: Sequence[RowRecord] | Finding) -> None:
        """Look at a raw row and what it became."""
        judged = source.contest_of(row)
        for watch in self._of[source.choice.location]:
            watch.note(row, judged, result)

    def report_to(self, report: DataReport) -> None:
        """Add the findings about whole sources, and the first rows that have a winner."""
        for verdicts, scores in self._of.values():
            report.add(verdicts.findings())
            report.add(scores.findings())
            report.verdicts += verdicts.shown
