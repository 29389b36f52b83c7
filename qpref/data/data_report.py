"""Report on a data set: rows read, kept, refused and dropped; findings; lengths of the texts."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Container, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from qpref.credentials import redact
from qpref.data.verdicts import ShownVerdict
from qpref.errors import DataError
from qpref.records import Finding, Message, PreferencePair, Source, UnpairedExample

log = logging.getLogger("qpref")

NUM_SHOWN = 20
"""Refused rows in the message of an error."""
WHOLE = 0
"""Line of a finding about a whole source."""
NUM_KEPT = 1000
"""Findings of each code and file that are kept in full; further ones are counted, and errors among them refuse rows."""


class Histogram(Counter[int]):
    """Counts of values in [2^(k-1), 2^k), by k; 0 has k = 0, and negative values have negative k."""

    def note(self, value: int) -> None:
        self[value.bit_length() if value >= 0 else -value.bit_length()] += 1

    def bars(self) -> list[tuple[int, int, int]]:
        """Return lowest value, highest value and count of each bar, from the lowest non-empty bar to the highest."""
        if not self:
            return []
        return [(*_range(k), self[k]) for k in range(min(self), max(self) + 1)]


def _range(k: int) -> tuple[int, int]:
    if k == 0:
        return 0, 0
    low, high = 2 ** (abs(k) - 1), 2 ** abs(k) - 1
    return (low, high) if k > 0 else (-high, -low)


@dataclass(slots=True)
class DataReport:
    """Counts and findings of a data set: read = kept + refused + dropped.

    Attributes:
        paths: locations of the sources.
        read: rows of all sources.
        findings: the first 1,000 findings of each code and file, in order of discovery.
        counts: (severity, code) -> number of findings.
        lengths: "prompt characters", "chosen tokens", ... -> histogram.
        repeated: rows that repeat an earlier row in every column, refused ones included.
        num_cut: rows that were truncated to the maximum lengths.
        num_several, num_pairs: rows with more than two responses that no check refuses, and the pairs that they make.
        verdicts: the first rows of each source of comparisons, with the response that won.
    """

    paths: tuple[str, ...]
    read: int = 0
    findings: list[Finding] = field(default_factory=list)
    counts: Counter[tuple[str, str]] = field(default_factory=Counter)
    lengths: dict[str, Histogram] = field(default_factory=dict)
    repeated: int = 0
    num_cut: int = 0
    num_several: int = 0
    num_pairs: int = 0
    verdicts: list[ShownVerdict] = field(default_factory=list)
    _read_from: Counter[str] = field(default_factory=Counter)
    _listed: Counter[tuple[str, str, str]] = field(default_factory=Counter)
    _refused: dict[str, dict[int, str]] = field(default_factory=dict)
    _dropped: dict[str, set[int]] = field(default_factory=dict)

    def note_read(self, source: Source) -> None:
        """Count a row that was read."""
        self.read += 1
        self._read_from[source.path] += 1

    def add(self, findings: Iterable[Finding]) -> None:
        """Add findings; an error refuses its row, and an error of a whole source (line 0) all of its rows."""
        for finding in findings:
            self.counts[finding.severity, finding.code] += 1
            key = finding.severity, finding.code, finding.source.path
            if self._listed[key] < NUM_KEPT:
                self._listed[key] += 1
                self.findings.append(finding)
            if finding.severity == "error":
                self._refused.setdefault(finding.source.path, {}).setdefault(finding.source.line, finding.code)

    def drop(self, source: Source) -> None:
        """Record a row that is dropped for its length (`on_overflow`)."""
        self._dropped.setdefault(source.path, set()).add(source.line)

    def leaves_out(self, source: Source) -> bool:
        """Return whether the row is refused or dropped."""
        refused, dropped = self._refused.get(source.path, ()), self._dropped.get(source.path, ())
        return source.line in refused or source.line in dropped or WHOLE in refused

    def reasons(self) -> Callable[[Source], list[str]]:
        """Return a function from a row that is left out to its reasons: messages of kept findings, else a code."""
        messages: dict[Source, list[str]] = {}
        for finding in self.findings:
            if finding.severity == "error" or finding.message.startswith("dropped: "):
                messages.setdefault(finding.source, []).append(finding.message)

        def of(source: Source) -> list[str]:
            refused = self._refused.get(source.path, {})
            code = refused.get(source.line, "over the recipe's maximum lengths")
            whole = messages.get(Source(path=source.path, line=WHOLE), []) if WHOLE in refused else []
            return messages.get(source, [] if whole else [code]) + whole

        return of

    @property
    def refused(self) -> int:
        return sum(self._read_from[path] if WHOLE in lines else len(lines) for path, lines in self._refused.items())

    @property
    def dropped(self) -> int:
        refused = {path: self._refused.get(path, {}).keys() for path in self._dropped}
        return sum(len(lines - refused[path]) for path, lines in self._dropped.items() if WHOLE not in refused[path])

    @property
    def kept(self) -> int:
        return self.read - self.refused - self.dropped

    @property
    def label(self) -> str:
        return ", ".join(self.paths)

    def measure_row(self, row: Sequence[PreferencePair | UnpairedExample]) -> None:
        """Add the lengths of a row's examples, and count them where there are several."""
        for example in row:
            self.measure(example)
        if len(row) > 1:
            self.num_several += 1
            self.num_pairs += len(row)

    def measure(self, example: PreferencePair | UnpairedExample) -> None:
        """Add the lengths of an example's sides, in characters."""
        sizes = {"prompt": _characters(example.prompt)}
        if isinstance(example, PreferencePair):
            sizes["chosen"], sizes["rejected"] = _characters(example.chosen), _characters(example.rejected)
        else:
            sizes["completion"] = _characters(example.completion)
        self.note_lengths(sizes, "characters")

    def note_lengths(self, sizes: dict[str, int], unit: Literal["characters", "tokens"]) -> None:
        """Add lengths by side, and for a pair the difference of its responses."""
        for side, size in sizes.items():
            self._note_length(f"{side} {unit}", size)
        if "chosen" in sizes:
            self._note_length(f"chosen - rejected {unit}", sizes["chosen"] - sizes["rejected"])

    def _note_length(self, name: str, size: int) -> None:
        histogram = self.lengths.get(name)
        if histogram is None:
            histogram = self.lengths[name] = Histogram()
        histogram.note(size)

    def log_warnings(self, logged: Container[tuple[str, str]] = ()) -> None:
        """Log one line for each warning of a whole source, and one for each code of the others, with the first row.

        Args:
            logged: (severity, code) of warnings that have been logged before.
        """
        warnings = [finding for finding in self.findings if finding.severity == "warning"]
        warnings = [finding for finding in warnings if ("warning", finding.code) not in logged]
        for finding in warnings:
            if not finding.source.line:
                log.warning("%s: %s", finding.source, finding.message)
        first = {finding.code: finding for finding in reversed(warnings) if finding.source.line}
        for code, finding in sorted(first.items()):
            count = self.counts["warning", code]
            log.warning("%s: %d %s (first: %s: %s)", code, count, "row" if count == 1 else "rows", finding.source,
                        finding.message)  # fmt: skip

    def stop_on_errors(self, allowed_share: float) -> None:
        """Raise if more rows are refused than the allowed share, if a whole source is, or if none is kept.

        Raises:
            DataError: the first refused rows, one per line.
        """
        errors = [finding for finding in self.findings if finding.severity == "error"]
        errors.sort(key=lambda finding: finding.source.line != WHOLE)
        refused = self.refused
        if errors and (refused > allowed_share * self.read or not self.kept or errors[0].source.line == WHOLE):
            lines = [f"{finding.source}: {finding.message}" for finding in errors[:NUM_SHOWN]]
            count = sum(number for (severity, _), number in self.counts.items() if severity == "error")
            if count > NUM_SHOWN:
                lines.append(f"and {count - NUM_SHOWN} more")
            share = f"; {refused} of {self.read} rows are refused" if self.read > 1 else ""
            raise DataError("\n".join(lines) + share, _hint({finding.code for finding in errors}))
        if not self.kept:
            raise DataError(f"{self.label}: no pair is left of {self.read} rows")
        if errors:
            log.warning("%s: %d of %d rows are left out (first: %s: %s)", self.label, refused, self.read,
                        errors[0].source, errors[0].message)  # fmt: skip

    def facts(self) -> dict[str, Any]:
        """Return the report as JSON data."""
        left_out: Counter[str] = Counter()
        for (_, code), number in self.counts.items():
            left_out[code] += number
        for (_, code, _), number in self._listed.items():
            left_out[code] -= number
        return {
            "sources": list(self.paths),
            "read": self.read,
            "kept": self.kept,
            "refused": self.refused,
            "dropped": self.dropped,
            "repeated": self.repeated,
            "cut": self.num_cut,
            "several_responses": {"rows": self.num_several, "pairs": self.num_pairs} if self.num_several else {},
            "counts": [
                {"severity": severity, "code": code, "count": number}
                for (severity, code), number in sorted(self.counts.items())
            ],
            "findings": [_fact(finding) for finding in self.findings],
            "findings_not_listed": +left_out,
            "verdicts": [_fact(verdict) for verdict in self.verdicts],
            "lengths": {
                name: [{"from": low, "to": high, "count": number} for low, high, number in histogram.bars()]
                for name, histogram in self.lengths.items()
            },
        }


def _characters(turns: Sequence[Message]) -> int:
    return len(turns[0].content) if len(turns) == 1 else sum(len(message.content) for message in turns)


def _fact(found: Finding | ShownVerdict) -> dict[str, Any]:
    """Return the record as JSON data, with the path and the line of its source before its texts; a password or token
    that a text quotes from a row is hidden, since data.json stays with the run."""
    fact: dict[str, Any] = asdict(found)
    fact |= {name: redact(value) for name, value in fact.items() if isinstance(value, str)}
    source, message = fact.pop("source"), fact.pop("message", None)
    start = {name: fact.pop(name) for name in ("code", "severity") if name in fact}
    return {**start, **source, **fact, **({} if message is None else {"message": message})}


def _hint(codes: set[str]) -> str:
    hint = "fix or drop the rows (`qpref check` lists all of them), or allow a share of them with [data] skip_bad"
    if "refused_source" in codes:
        return "`qpref check` prints rows with the side that won; docs/data.md has the verdicts of each format"
    if codes == {"identical"}:
        hint = 'drop the lines, or set [checks] identical = "warn"'
    if codes == {"too_long"}:
        hint = 'raise [data] max_length, or set [data] on_overflow = "drop" or "truncate"'
    if codes == {"unpaired"}:
        hint = "use a loss on single completions in [loss], or data with pairs; `qpref losses` lists both kinds"
    return hint
