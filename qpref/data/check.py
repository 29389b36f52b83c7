"""Reads a file of pairs, runs the validators over it, and says which rows are refused and why."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from qpref.data.shapes import pair_of_row
from qpref.errors import DataError, PluginError, QprefError
from qpref.hooks.manager import Loaded
from qpref.plan import Choice
from qpref.records import Finding, PreferencePair, Source, TokenizedExample

log = logging.getLogger("qpref")

NUM_SHOWN = 20

Placed = TypeVar("Placed", PreferencePair, TokenizedExample)


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
        return hint


def read_pairs(path: Path, reader: Loaded, validators: Sequence[Choice]) -> tuple[list[PreferencePair], DataReport]:
    """All pairs of a file that are pairs, and the report so far; nothing is dropped for a validator's finding yet.

    Raises:
        DataError: the file cannot be read.
        PluginError: the reader or a validator raised.
    """
    if not path.is_file():
        raise DataError(f"{path}: " + ("no such file" if not path.exists() else "not a regular file"))
    report = DataReport(str(path))
    pairs: list[PreferencePair] = []
    try:
        for row in reader.record.read(path):
            report.read += 1
            pair = row if isinstance(row, Finding) else pair_of_row(row)
            if isinstance(pair, Finding):
                report.findings.append(pair)
            else:
                pairs.append(pair)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error
    except QprefError:
        raise
    except (Exception, SystemExit) as error:
        raise PluginError(f"{reader.offer} failed on {path}: {type(error).__name__}: {error}") from error
    for validator in validators:
        try:
            findings = list(validator.plugin.record.check(validator.options, pairs))
        except (Exception, SystemExit) as error:
            raise PluginError(f"{validator.plugin.offer} failed: {type(error).__name__}: {error}") from error
        if strange := [finding for finding in findings if not isinstance(finding, Finding)]:
            raise PluginError(f"{validator.plugin.offer} yields {type(strange[0]).__name__}, not Finding")
        report.findings += findings
    return pairs, report
