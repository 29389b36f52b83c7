"""Shows every row of a data set to the validators, and says which are refused and why; keeps none of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from qpref.data.data_report import DataReport
from qpref.data.repeats import Repeats
from qpref.data.singles import singles_of
from qpref.data.source import CheckedRow, DataSource
from qpref.data.split import HeldOutShare
from qpref.errors import PluginError
from qpref.hooks.types import RowCheck, Split
from qpref.recipe.choices import Choice, SourceChoice
from qpref.records import Finding, Row, UnpairedExample


@dataclass(slots=True, kw_only=True)
class CheckedRows:
    """The rows of one split, all of which have been looked at. They aren't kept: whoever wants them reads them again.

    Attributes:
        pairs_alone: refuse single completions, which the loss cannot use.
        as_singles: give each pair as the two single completions that it holds.
        share: where the split is a part of its sources; None where it is all of them.
        report: what was found so far, of all splits.
        read: rows of this split.
        weights: path of the rows -> how often an epoch trains on each, where that isn't once.
    """

    split: Split
    sources: tuple[DataSource, ...]
    share: HeldOutShare | None
    pairs_alone: bool
    as_singles: bool = False
    report: DataReport
    read: int = 0
    weights: dict[str, float] = field(default_factory=dict)

    def rows(self) -> Iterator[CheckedRow]:
        """The examples that nothing refuses, in the sources' order.

        Raises:
            DataError: a file has changed since it was read first.
        """
        for row in self.looked_at():
            if isinstance(row, Finding) or self.report.leaves_out(row[0].source):
                continue
            yield from singles_of(row) if self.as_singles else row

    @property
    def label(self) -> str:
        return ", ".join(source.choice.location for source in self.sources)

    @property
    def is_empty(self) -> bool:
        """Whether nothing of it is left."""
        return next(self.rows(), None) is None

    @property
    def why_empty(self) -> str:
        if self.share is not None and not self.read:
            return f"{self.label}: heldout_share {self.share.share:g} leaves no row for {self.split}; change it"
        return f"{self.label}: no pair is left of {self.read} rows"

    def looked_at(self, note: Callable[[Row], None] | None = None) -> Iterator[Sequence[CheckedRow] | Finding]:
        """Each row of this split as one or more examples, or why it is none.

        Args:
            note: is shown each row of the sources that could be read.
        """
        for source in self.sources:
            for row in source.rows(note):
                if self.share is not None and self.share.split_of(row) != self.split:
                    continue
                if not isinstance(row, Finding) and source.choice.weight != 1:
                    self.weights[row[0].source.path] = source.choice.weight
                yield self._refused_singles(row) if self.pairs_alone and not isinstance(row, Finding) else row

    def _refused_singles(self, row: Sequence[CheckedRow]) -> Sequence[CheckedRow] | Finding:
        if not isinstance(row[0], UnpairedExample):
            return row
        message = "a single completion with a label; the loss needs pairs (prompt, chosen, rejected)"
        return Finding(code="unpaired", severity="error", message=message, source=row[0].source)


@dataclass(frozen=True, slots=True)
class CheckedData:
    """A data set whose rows have all been looked at; `heldout` is None where the recipe names none."""

    train: CheckedRows
    heldout: CheckedRows | None
    report: DataReport


def check_data(
    sources: Sequence[SourceChoice],
    validators: Sequence[Choice],
    *,
    pairs_alone: bool = True,
    share: HeldOutShare | None = None,
) -> CheckedData:
    """Look at all rows of a data set, none of which stays in memory: the held-out ones, then those to train on.

    Args:
        pairs_alone: refuse single completions, which the loss cannot use.
        share: what part of the training sources to hold out; None where held-out data have sources of their own.

    Raises:
        DataError: a source cannot be read.
        PluginError: a reader or a validator raised.
    """
    report = DataReport(tuple(dict.fromkeys(source.location for source in reversed(sources))))
    opened = [(source.split, DataSource(source)) for source in sources]

    def rows_of(split: Split) -> CheckedRows:
        own = tuple(source for of, source in opened if of == split or share is not None)
        return CheckedRows(split=split, sources=own, share=share, pairs_alone=pairs_alone, report=report)

    train, heldout = rows_of("train"), rows_of("heldout")
    checks = [_RunningCheck.of(validator) for validator in validators]
    repeats = Repeats()
    for rows in (heldout, train):
        # A held-out share is a part of the training sources, which are noted with the training rows.
        _look(rows, checks, report, None if rows is heldout and share else repeats.note)
    report.repeated = repeats.count()
    for check in checks:
        report.add(check.finish())
    return CheckedData(train, heldout if heldout.sources else None, report)


def _look(
    rows: CheckedRows,
    checks: Sequence[_RunningCheck],
    report: DataReport,
    note: Callable[[Row], None] | None,
) -> None:
    for row in rows.looked_at(note):
        report.read += 1
        rows.read += 1
        if isinstance(row, Finding):
            report.add([row])
            continue
        for example in row:
            report.measure(example)
            for check in checks:
                report.add(check.look(example, rows.split))


@dataclass(frozen=True, slots=True)
class _RunningCheck:
    """A validator at work; whatever it raises names it."""

    validator: Choice
    check: RowCheck

    @classmethod
    def of(cls, validator: Choice) -> _RunningCheck:
        try:
            return cls(validator, validator.plugin.record.start(validator.options))
        except (Exception, SystemExit) as error:
            raise _failure(validator, error) from error

    def look(self, example: CheckedRow, split: Split) -> Iterator[Finding]:
        return self._findings(self.check.look, example, split)

    def finish(self) -> Iterator[Finding]:
        return self._findings(self.check.finish)

    def _findings(self, find: Callable[..., Iterable[Finding]], *arguments: Any) -> Iterator[Finding]:
        """One at a time: there may be as many as rows."""
        try:
            for finding in find(*arguments):
                if not isinstance(finding, Finding):
                    raise PluginError(f"{self.validator.plugin.offer} yields {type(finding).__name__}, not Finding")
                yield finding
        except PluginError:
            raise
        except (Exception, SystemExit) as error:
            raise _failure(self.validator, error) from error


def _failure(validator: Choice, error: BaseException) -> PluginError:
    return PluginError(f"{validator.plugin.offer} failed: {type(error).__name__}: {error}")
