"""Reads a file of rows, runs the validators over it, and says which are refused and why; keeps none of them."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from qpref.data.shapes import is_unpaired, pair_of_row, unpair, unpaired_of_row
from qpref.errors import DataError, PluginError, QprefError
from qpref.hooks.manager import Loaded
from qpref.hooks.types import RowCheck
from qpref.plan import Choice
from qpref.records import Finding, PreferencePair, Row, Source, TokenizedExample, UnpairedExample

log = logging.getLogger("qpref")

NUM_SHOWN = 20

CheckedRow = PreferencePair | UnpairedExample
Placed = TypeVar("Placed", PreferencePair, UnpairedExample, CheckedRow, TokenizedExample)


@dataclass(slots=True)
class DataReport:
    """What became of a file's rows: read = kept + refused + dropped (over-long, by the recipe's wish)."""

    path: str
    read: int = 0
    dropped: int = 0
    findings: list[Finding] = field(default_factory=list)

    @property
    def refused(self) -> set[Source]:
        return {finding.source for finding in self.findings if finding.severity == "error"}

    @property
    def kept(self) -> int:
        return self.read - len(self.refused) - self.dropped

    def keep(self, examples: Iterable[Placed]) -> list[Placed]:
        """The examples that no error refuses."""
        refused = self.refused
        return [example for example in examples if example.source not in refused]

    def log_warnings(self) -> None:
        """One line for each kind of warning, with the first place that has it."""
        warnings = [finding for finding in self.findings if finding.severity == "warning"]
        first = {finding.code: finding for finding in reversed(warnings)}
        for code, count in sorted(Counter(finding.code for finding in warnings).items()):
            log.warning("%s: %d rows: %s (first: %s)", self.path, count, first[code].message, first[code].source)

    def stop_on_errors(self, allowed_share: float) -> None:
        """Refuse to go on with bad rows beyond the allowed share, or with no row at all.

        Raises:
            DataError: names the first rows that are refused, one a line.
        """
        errors = [finding for finding in self.findings if finding.severity == "error"]
        refused = len(self.refused)
        if errors and (refused > allowed_share * self.read or not self.kept):
            lines = [f"{finding.source}: {finding.message}" for finding in errors[:NUM_SHOWN]]
            if len(errors) > NUM_SHOWN:
                lines.append(f"and {len(errors) - NUM_SHOWN} more")
            share = f"; {refused} of {self.read} rows are refused" if self.read > 1 else ""
            raise DataError("\n".join(lines) + share, self._hint({finding.code for finding in errors}))
        if not self.kept:
            raise DataError(f"{self.path}: no pair is left of {self.read} rows")
        if errors:
            log.warning("%s: %d of %d rows are left out (first: %s: %s)", self.path, refused, self.read,
                        errors[0].source, errors[0].message)  # fmt: skip

    def _hint(self, codes: set[str]) -> str:
        hint = "correct or drop the rows, or allow a share of them with [data] skip_bad"
        if codes == {"identical"}:
            hint = 'drop the lines, or set [checks] identical = "warn"'
        if codes == {"too_long"}:
            hint = 'raise [data] max_length, or set [data] on_overflow = "drop" or "truncate"'
        if codes == {"unpaired"}:
            hint = "name a loss of single completions in [loss], or bring pairs; `qpref losses` lists both kinds"
        return hint


@dataclass(slots=True, kw_only=True)
class CheckedFile:
    """A file whose rows have all been looked at. They aren't kept: whoever wants them reads the file again.

    Attributes:
        pairs_alone: refuse single completions, which the loss cannot use.
        as_singles: give each pair as the two single completions that it holds.
        report: what was found so far.
    """

    path: Path
    reader: Loaded
    pairs_alone: bool = True
    as_singles: bool = False
    report: DataReport
    _stamp: tuple[int, int, int] | None = None

    def rows(self) -> Iterator[CheckedRow]:
        """The rows that no error refuses, in the file's order.

        Raises:
            DataError: the file has changed since it was read first.
        """
        refused = self.report.refused
        for example in self._examples():
            if isinstance(example, Finding) or example.source in refused:
                continue
            if self.as_singles and isinstance(example, PreferencePair):
                yield from unpair(example)
            else:
                yield example

    def check(self, validators: Sequence[Choice]) -> None:
        """Read the file, and show each example to all validators; nothing is dropped for what they find yet.

        Raises:
            DataError: the file cannot be read.
            PluginError: the reader or a validator raised.
        """
        checks = [RunningCheck.of(validator) for validator in validators]
        for example in self._examples():
            self.report.read += 1
            if isinstance(example, Finding):
                self.report.findings.append(example)
                continue
            for check in checks:
                self.report.findings += check.look(example)
        for check in checks:
            self.report.findings += check.finish()

    def _examples(self) -> Iterator[CheckedRow | Finding]:
        """Each row as an example, or why it is none."""
        stamp = _stamp(self.path)
        self._stamp = self._stamp or stamp
        yield from self._read()
        if not self._stamp == stamp == _stamp(self.path):
            raise DataError(f"{self.path}: has changed while it was read", "start again once nothing writes to it")

    def _read(self) -> Iterator[CheckedRow | Finding]:
        try:
            for row in self.reader.record.read(self.path):
                yield row if isinstance(row, Finding) else _example(row, self.pairs_alone)
        except OSError as error:
            raise DataError(f"{self.path}: cannot be read: {error.strerror}") from error
        except QprefError:
            raise
        except (Exception, SystemExit) as error:
            raise PluginError(f"{self.reader.offer} failed on {self.path}: {type(error).__name__}: {error}") from error


def read_rows(path: Path, reader: Loaded, validators: Sequence[Choice], pairs_alone: bool = True) -> CheckedFile:
    """Look at all rows of a file, none of which stays in memory.

    Args:
        pairs_alone: refuse single completions, which the loss cannot use.

    Raises:
        DataError: the file cannot be read.
        PluginError: the reader or a validator raised.
    """
    if not path.is_file():
        raise DataError(f"{path}: " + ("no such file" if not path.exists() else "not a regular file"))
    checked = CheckedFile(path=path, reader=reader, pairs_alone=pairs_alone, report=DataReport(str(path)))
    checked.check(validators)
    return checked


def _stamp(path: Path) -> tuple[int, int, int]:
    status = path.stat()
    return status.st_ino, status.st_size, status.st_mtime_ns


@dataclass(frozen=True, slots=True)
class RunningCheck:
    """A validator at work; whatever it raises names it."""

    validator: Choice
    check: RowCheck

    @classmethod
    def of(cls, validator: Choice) -> RunningCheck:
        return cls(validator, _called(validator, lambda: validator.plugin.record.start(validator.options)))

    def look(self, example: CheckedRow) -> list[Finding]:
        return self._findings(lambda: self.check.look(example, "train"))

    def finish(self) -> list[Finding]:
        return self._findings(self.check.finish)

    def _findings(self, find: Callable[[], Iterable[Finding]]) -> list[Finding]:
        findings: list[Finding] = _called(self.validator, lambda: list(find()))
        if strange := [finding for finding in findings if not isinstance(finding, Finding)]:
            raise PluginError(f"{self.validator.plugin.offer} yields {type(strange[0]).__name__}, not Finding")
        return findings


def _called(validator: Choice, call: Callable[[], Any]) -> Any:
    try:
        return call()
    except (Exception, SystemExit) as error:
        raise PluginError(f"{validator.plugin.offer} failed: {type(error).__name__}: {error}") from error


def _example(row: Row, pairs_alone: bool) -> CheckedRow | Finding:
    if not is_unpaired(row):
        return pair_of_row(row)
    if pairs_alone:
        message = "a single completion with a label; the loss needs pairs (prompt, chosen, rejected)"
        return Finding(code="unpaired", severity="error", message=message, source=row.source)
    return unpaired_of_row(row)
