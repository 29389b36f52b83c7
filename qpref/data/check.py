"""Run the validators over every row of a data set and collect the findings; no row stays in memory."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from qpref.data.data_report import DataReport
from qpref.data.example_rows import ExampleRow, RowRecord
from qpref.data.label_watch import LabelWatch
from qpref.data.lists import lists_of
from qpref.data.running_check import RunningCheck, change_of_any
from qpref.data.singles import singles_of
from qpref.data.source import DataSource
from qpref.data.split import HeldOutShare
from qpref.hooks import border
from qpref.hooks.types import Split
from qpref.recipe.choices import Choice, SourceChoice
from qpref.records import Finding, PreferencePair, Row, Source, UnpairedExample
from qpref.rows.formats import COLUMNS
from qpref.rows.unread_keys import UnreadKeys

Watch = Callable[[DataSource, Row, Sequence[RowRecord] | Finding], None]


@dataclass(slots=True, kw_only=True)
class CheckedRows:
    """The rows of one split after all checks. They are not kept in memory: each pass reads the sources again.

    Attributes:
        pairs_only: refuse single completions, which the loss cannot use.
        as_singles: split each pair into its two single completions.
        as_lists: join the pairs of a row into ranked lists.
        share: the held-out share where the split is a part of its sources; None where it is all of them.
        report: what was found so far, of all splits.
        read: rows of this split.
        weights: path of the rows -> passes over each row per epoch, where that isn't 1.
        pairs: path -> line of each pair, for a loss that takes pairs apart into single completions.
        margins: path -> line of each of those pairs that has a margin.
    """

    split: Split
    sources: tuple[DataSource, ...]
    share: HeldOutShare | None
    pairs_only: bool
    as_singles: bool = False
    as_lists: bool = False
    report: DataReport
    read: int = 0
    weights: dict[str, float] = field(default_factory=dict)
    pairs: dict[str, array[int]] = field(default_factory=dict)
    margins: dict[str, array[int]] = field(default_factory=dict)

    def rows(self) -> Iterator[ExampleRow]:
        """Read the kept examples, in the order of the sources.

        Raises:
            DataError: a file has changed since it was first read.
        """
        for row in self.all_rows():
            if isinstance(row, Finding) or self.report.leaves_out(row[0].source):
                continue
            if self.as_lists:
                yield from lists_of([one for one in row if isinstance(one, PreferencePair)])
            else:
                yield from singles_of(row) if self.as_singles else row

    @property
    def label(self) -> str:
        return ", ".join(source.choice.location for source in self.sources)

    @property
    def is_empty(self) -> bool:
        """True where no example is kept."""
        return next(self.rows(), None) is None

    @property
    def why_empty(self) -> str:
        if self.share is not None and not self.read:
            return f"{self.label}: heldout_share {self.share.share:g} leaves no row for {self.split}; change it"
        return f"{self.label}: no pair is left of {self.read} rows"

    def note_pairs(self, row: Sequence[RowRecord]) -> None:
        """Note the pairs in a row, so that those that are kept can be counted without reading the data twice."""
        for example in row:
            if isinstance(example, PreferencePair):
                source = example.source
                self.pairs.setdefault(source.path, array("q")).append(source.line)
                if example.margin:
                    self.margins.setdefault(source.path, array("q")).append(source.line)

    def count_kept(self, noted: Mapping[str, array[int]]) -> int:
        """Count the noted pairs (`pairs` or `margins`) whose rows nothing refuses."""
        sources = (Source(path=path, line=line) for path, lines in noted.items() for line in lines)
        return sum(not self.report.leaves_out(source) for source in sources)

    def all_rows(
        self, note: Callable[[Row], None] | None = None, watch: Watch | None = None
    ) -> Iterator[Sequence[RowRecord] | Finding]:
        """Yield each row of this split as one or more examples, or the finding that refuses it.

        Args:
            note: called with each raw row of the sources.
            watch: called with each raw row of this split, its source and its result.
        """
        for source in self.sources:
            for raw in source.raw():
                if note is not None and isinstance(raw, Row):
                    note(raw)
                row = source.records(raw)
                if self.share is not None and self.share.split_of(row) != self.split:
                    continue
                if watch is not None and isinstance(raw, Row):
                    watch(source, raw, row)
                if not isinstance(row, Finding) and source.choice.weight != 1:
                    self.weights[row[0].source.path] = source.choice.weight
                yield self._refused_singles(row) if self.pairs_only and not isinstance(row, Finding) else row

    def raw_rows(self, source: DataSource) -> Iterator[Row | Finding]:
        """Yield the rows of this split in one of its sources, as the reader parsed them."""
        for raw in source.raw():
            if self.share is None or self.share.split_of(source.records(raw)) == self.split:
                yield raw

    def _refused_singles(self, row: Sequence[RowRecord]) -> Sequence[RowRecord] | Finding:
        if not isinstance(row[0], UnpairedExample):
            return row
        message = "a single completion with a label; the loss needs pairs (prompt, chosen, rejected)"
        return Finding(code="unpaired", severity="error", message=message, source=row[0].source)


@dataclass(frozen=True, slots=True)
class CheckedData:
    """A data set after all checks; `heldout` is None where the recipe has no held-out data."""

    train: CheckedRows
    heldout: CheckedRows | None
    report: DataReport

    @property
    def splits(self) -> list[CheckedRows]:
        """The splits there are, the training rows first."""
        return [rows for rows in (self.train, self.heldout) if rows is not None]


def check_data(
    sources: Sequence[SourceChoice],
    validators: Sequence[Choice],
    *,
    pairs_only: bool = True,
    share: HeldOutShare | None = None,
) -> CheckedData:
    """Check all rows of a data set, the held-out ones first; no row stays in memory.

    Args:
        pairs_only: refuse single completions, which a loss on pairs cannot use.
        share: the share of the training sources to hold out; None where the held-out data have sources of their own.

    Raises:
        DataError: a source cannot be read.
        PluginError: a reader or a validator raised.
    """
    report = DataReport(tuple(dict.fromkeys(source.location for source in reversed(sources))))
    opened = [(source.split, DataSource(source)) for source in sources]

    def rows_of(split: Split) -> CheckedRows:
        own = tuple(source for of, source in opened if of == split or share is not None)
        return CheckedRows(split=split, sources=own, share=share, pairs_only=pairs_only, report=report)

    train, heldout = rows_of("train"), rows_of("heldout")
    checks = [RunningCheck.of(validator) for validator in validators]
    repeats = RepeatCounter()
    unread = UnreadKeys(COLUMNS.union(*(source.own_columns for source in sources)))
    labels = LabelWatch(source for _, source in opened)

    def watch(source: DataSource, row: Row, result: Sequence[RowRecord] | Finding) -> None:
        labels.note(source, row, result)
        if not isinstance(result, Finding):  # a refused row has its own reason
            unread.note(row)

    with border.unchanged(change_of_any(sources, validators)):
        for rows in (heldout, train):
            # A held-out share is part of the training sources, whose raw rows are counted in the training pass.
            _check_rows(rows, checks, report, None if rows is heldout and share else repeats.note, watch)
        num_refused = report.refused
        for _, source in opened:
            report.add(source.notes)
        report.repeated = repeats.count()
        report.add(unread.findings())
        labels.report_to(report)
        for check in checks:
            if check.may_refuse:
                report.add(check.finish())
        others = [check for check in checks if not check.may_refuse]
        if report.refused > num_refused:
            others = _restarted(others, (heldout, train), report)
        for check in others:
            report.add(check.finish())
    return CheckedData(train, heldout if heldout.sources else None, report)


def _check_rows(
    rows: CheckedRows,
    checks: Sequence[RunningCheck],
    report: DataReport,
    note: Callable[[Row], None] | None,
    watch: Watch,
) -> None:
    of_all = [check for check in checks if not check.skips_refused]
    of_kept = [check for check in checks if check.skips_refused]
    for row in rows.all_rows(note, watch):
        report.note_read(row.source if isinstance(row, Finding) else row[0].source)
        rows.read += 1
        if isinstance(row, Finding):
            report.add([row])
            continue
        if not rows.pairs_only:
            rows.note_pairs(row)
        _look(row, of_all, rows.split, report)
        if not report.leaves_out(row[0].source):
            _look(row, of_kept, rows.split, report)
            report.measure_row(row)


def _restarted(checks: Sequence[RunningCheck], splits: Iterable[CheckedRows], report: DataReport) -> list[RunningCheck]:
    """Restart the checks that skip refused rows, and show them those rows that are left at the end.

    What they find while they look was reported the first time.
    """
    checks = [RunningCheck.of(check.validator) if check.skips_refused else check for check in checks]
    of_kept = [check for check in checks if check.skips_refused]
    for rows in splits if of_kept else ():
        for row in rows.all_rows():
            if isinstance(row, Finding) or report.leaves_out(row[0].source):
                continue
            for example in row:
                for check in of_kept:
                    check.look(example, rows.split)
    return checks


def _look(row: Sequence[RowRecord], checks: Sequence[RunningCheck], split: Split, report: DataReport) -> None:
    for example in row:
        for check in checks:
            if found := check.look(example, split):
                report.add(found)


class RepeatCounter:
    """Count raw rows that repeat an earlier row in every column.

    Keeps an 8-byte hash per row: among 10 million rows, two different ones collide with a probability of 1 in 370,000.
    """

    def __init__(self) -> None:
        self._hashes = array("q")

    def note(self, row: Row) -> None:
        # Python's hash distinguishes texts, but not 1, 1.0 and True. That of a text is kept in it, for the checks too.
        values = (value if type(value) is str else (repr(value),) for value in row.values.values())
        self._hashes.append(hash((*row.values, *values)))

    def count(self) -> int:
        """Return the number of rows that repeat an earlier one."""
        import numpy

        return len(self._hashes) - len(numpy.unique(numpy.frombuffer(self._hashes, "q"))) if self._hashes else 0
