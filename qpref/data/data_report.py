"""What is told of a data set: how many rows became what, what was found, and how long its texts are."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Container, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from qpref.errors import DataError
from qpref.records import Finding, Message, PreferencePair, Source, UnpairedExample

log = logging.getLogger("qpref")

NUM_SHOWN = 20
NUM_KEPT = 1000
"""Findings of one code that are kept whole; of the rest only their number and, for errors, their rows are."""


class Histogram(Counter[int]):
    """How many values lie in [2^(k-1), 2^k), by k; 0 has k = 0, and negative values negative k."""

    def note(self, value: int) -> None:
        self[value.bit_length() if value >= 0 else -value.bit_length()] += 1

    def bars(self) -> list[tuple[int, int, int]]:
        """Lowest value, highest value and number of each bar, from the lowest bar that has any to the highest."""
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
    """What became of the rows of a data set: read = kept + refused + dropped.

    Attributes:
        read: rows, of all sources.
        findings: the first 1,000 of each code, in the order in which they were found.
        counts: how many of each (severity, code) there are.
        lengths: of texts, by what is measured: "prompt characters", "chosen tokens", ...
        repeated: rows whose columns all hold what an earlier row's do, refused ones too.
        num_cut: rows that were cut to length.
    """

    paths: tuple[str, ...]
    read: int = 0
    findings: list[Finding] = field(default_factory=list)
    counts: Counter[tuple[str, str]] = field(default_factory=Counter)
    lengths: dict[str, Histogram] = field(default_factory=dict)
    repeated: int = 0
    num_cut: int = 0
    _refused: dict[str, dict[int, str]] = field(default_factory=dict)
    _dropped: dict[str, set[int]] = field(default_factory=dict)

    def add(self, findings: Iterable[Finding]) -> None:
        """Note what was found; an error refuses its row."""
        for finding in findings:
            key = finding.severity, finding.code
            if self.counts[key] < NUM_KEPT:
                self.findings.append(finding)
            self.counts[key] += 1
            if finding.severity == "error":
                self._refused.setdefault(finding.source.path, {}).setdefault(finding.source.line, finding.code)

    def drop(self, source: Source) -> None:
        """Note a row that is left out for its length, by the recipe's wish."""
        self._dropped.setdefault(source.path, set()).add(source.line)

    def leaves_out(self, source: Source) -> bool:
        """Whether the row is refused or dropped."""
        refused, dropped = self._refused.get(source.path, ()), self._dropped.get(source.path, ())
        return source.line in refused or source.line in dropped

    def reasons(self) -> Callable[[Source], list[str]]:
        """Tells of each row that is left out why: what the findings say, as far as they are kept, else a code."""
        said: dict[Source, list[str]] = {}
        for finding in self.findings:
            if finding.severity == "error" or finding.message.startswith("dropped: "):
                said.setdefault(finding.source, []).append(finding.message)

        def of(source: Source) -> list[str]:
            code = self._refused.get(source.path, {}).get(source.line, "over the recipe's lengths")
            return said.get(source, [code])

        return of

    @property
    def refused(self) -> int:
        return sum(map(len, self._refused.values()))

    @property
    def dropped(self) -> int:
        return sum(len(lines - self._refused.get(path, {}).keys()) for path, lines in self._dropped.items())

    @property
    def kept(self) -> int:
        return self.read - self.refused - self.dropped

    @property
    def label(self) -> str:
        return ", ".join(self.paths)

    def measure(self, example: PreferencePair | UnpairedExample) -> None:
        """Count the characters of an example's sides."""
        sizes = {"prompt": _characters(example.prompt)}
        if isinstance(example, PreferencePair):
            sizes["chosen"], sizes["rejected"] = _characters(example.chosen), _characters(example.rejected)
        else:
            sizes["completion"] = _characters(example.completion)
        self.note_lengths(sizes, "characters")

    def note_lengths(self, sizes: dict[str, int], unit: Literal["characters", "tokens"]) -> None:
        """Count lengths by side; of a pair, the difference of its responses too."""
        if "chosen" in sizes:
            sizes = sizes | {"chosen - rejected": sizes["chosen"] - sizes["rejected"]}
        for side, size in sizes.items():
            name = f"{side} {unit}"
            if name not in self.lengths:
                self.lengths[name] = Histogram()
            self.lengths[name].note(size)

    def log_warnings(self, told: Container[tuple[str, str]] = ()) -> None:
        """One line for each warning of a whole source, and for each kind of the others, with the first place.

        Args:
            told: (severity, code) of those that have had their line.
        """
        warnings = [finding for finding in self.findings if finding.severity == "warning"]
        warnings = [finding for finding in warnings if ("warning", finding.code) not in told]
        for finding in warnings:
            if not finding.source.line:
                log.warning("%s: %s", finding.source, finding.message)
        first = {finding.code: finding for finding in reversed(warnings) if finding.source.line}
        for code, finding in sorted(first.items()):
            count = self.counts["warning", code]
            log.warning("%s: %d %s (first: %s: %s)", code, count, "row" if count == 1 else "rows", finding.source,
                        finding.message)  # fmt: skip

    def stop_on_errors(self, allowed_share: float) -> None:
        """Refuse to go on with bad rows beyond the allowed share, or with no row at all.

        Raises:
            DataError: names the first rows that are refused, one a line.
        """
        errors = [finding for finding in self.findings if finding.severity == "error"]
        refused = self.refused
        if errors and (refused > allowed_share * self.read or not self.kept):
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
        """The report as JSON data."""
        left_out: Counter[str] = Counter()
        for (_, code), number in self.counts.items():
            left_out[code] += max(0, number - NUM_KEPT)
        return {
            "sources": list(self.paths),
            "read": self.read,
            "kept": self.kept,
            "refused": self.refused,
            "dropped": self.dropped,
            "repeated": self.repeated,
            "cut": self.num_cut,
            "counts": [
                {"severity": severity, "code": code, "count": number}
                for (severity, code), number in sorted(self.counts.items())
            ],
            "findings": [_fact(finding) for finding in self.findings],
            "findings_not_listed": +left_out,
            "lengths": {
                name: [{"from": low, "to": high, "count": number} for low, high, number in histogram.bars()]
                for name, histogram in self.lengths.items()
            },
        }


def _characters(turns: Sequence[Message]) -> int:
    return len(turns[0].content) if len(turns) == 1 else sum(len(message.content) for message in turns)


def _fact(finding: Finding) -> dict[str, Any]:
    fact = asdict(finding)
    source = fact.pop("source")
    return {"code": fact["code"], "severity": fact["severity"], **source, "message": fact["message"]}


def _hint(codes: set[str]) -> str:
    hint = "correct or drop the rows (`qpref check` lists them all), or allow a share of them with [data] skip_bad"
    if codes == {"identical"}:
        hint = 'drop the lines, or set [checks] identical = "warn"'
    if codes == {"too_long"}:
        hint = 'raise [data] max_length, or set [data] on_overflow = "drop" or "truncate"'
    if codes == {"unpaired"}:
        hint = "name a loss of single completions in [loss], or bring pairs; `qpref losses` lists both kinds"
    return hint
