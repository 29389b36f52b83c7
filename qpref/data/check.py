"""Reads a file of pairs, runs the validators over it, and says which rows are refused and why."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from qpref.data.shapes import is_unpaired, pair_of_row, unpaired_of_row
from qpref.errors import DataError, PluginError, QprefError
from qpref.hooks.manager import Loaded
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


def read_rows(
    path: Path, reader: Loaded, validators: Sequence[Choice], pairs_alone: bool = True
) -> tuple[list[CheckedRow], DataReport]:
    """All rows of a file that are examples, and the report so far; nothing is dropped for a validator's finding yet.

    Args:
        pairs_alone: refuse single completions, which the loss cannot use.

    Raises:
        DataError: the file cannot be read.
        PluginError: the reader or a validator raised.
    """
    if not path.is_file():
        raise DataError(f"{path}: " + ("no such file" if not path.exists() else "not a regular file"))
    report = DataReport(str(path))
    examples: list[CheckedRow] = []
    try:
        for row in reader.record.read(path):
            report.read += 1
            example = row if isinstance(row, Finding) else _example(row, pairs_alone)
            if isinstance(example, Finding):
                report.findings.append(example)
            else:
                examples.append(example)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error
    except QprefError:
        raise
    except (Exception, SystemExit) as error:
        raise PluginError(f"{reader.offer} failed on {path}: {type(error).__name__}: {error}") from error
    pairs = [example for example in examples if isinstance(example, PreferencePair)]
    for validator in validators:
        try:
            findings = list(validator.plugin.record.check(validator.options, pairs))
        except (Exception, SystemExit) as error:
            raise PluginError(f"{validator.plugin.offer} failed: {type(error).__name__}: {error}") from error
        if strange := [finding for finding in findings if not isinstance(finding, Finding)]:
            raise PluginError(f"{validator.plugin.offer} yields {type(strange[0]).__name__}, not Finding")
        report.findings += findings
    return examples, report


def _example(row: Row, pairs_alone: bool) -> CheckedRow | Finding:
    if not is_unpaired(row):
        return pair_of_row(row)
    if pairs_alone:
        message = "a single completion with a label; the loss needs pairs (prompt, chosen, rejected)"
        return Finding(code="unpaired", severity="error", message=message, source=row.source)
    return unpaired_of_row(row)
