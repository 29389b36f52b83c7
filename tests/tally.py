"""Counts over all tests of failures: what they did, and what was lost; pytest prints the sums at its end."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

STEPS = "acknowledged steps lost beyond a save interval"
ROWS = "rows of metrics lost or doubled"
INPUTS = "input rows neither used nor reported"
LOSSES = (STEPS, ROWS, INPUTS)
PREFIX = "tally: "
_sums: Counter[str] = Counter()


class Tally(Counter[str]):
    """What one test counts: "SIGKILLs", "resumes", ..., and the three kinds of losses, which have to be 0."""

    def compare_rows(self, found: list[dict[str, Any]], expected: list[dict[str, Any]]) -> None:
        """Count the rows of metrics that a run lacks, and those that it has too often or in another order."""
        ours, theirs = (Counter(json.dumps(row, sort_keys=True) for row in rows) for rows in (found, expected))
        self[ROWS] += (ours - theirs).total() + (theirs - ours).total() or int(found != expected)
        self["rows of metrics"] += len(found)

    def compare_inputs(self, folder: Path, num_rows: int) -> None:
        """Count the input rows that a run has neither trained on or held out, nor reported.

        Args:
            num_rows: lines of the run's data files.
        """
        report = json.loads((folder / "data.json").read_text())
        examples = json.loads((folder / "run.json").read_text())["examples"]
        self[INPUTS] += abs(num_rows - sum(examples.values()) - report["refused"] - report["dropped"])
        self["input rows"] += num_rows

    def losses(self) -> dict[str, int]:
        return {name: self[name] for name in LOSSES if self[name]}


@pytest.fixture
def tally(record_property: Callable[[str, object], None]) -> Iterator[Tally]:
    """Counts of a test, which fails if it has counted a loss."""
    counted = Tally(dict.fromkeys(LOSSES, 0))
    yield counted
    for name, count in counted.items():
        record_property(PREFIX + name, count)
    assert counted.losses() == {}


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Add a test's counts, which xdist's workers send with its report."""
    if report.when == "teardown":
        _sums.update({name: count for name, count in report.user_properties if name.startswith(PREFIX)})


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if _sums:
        terminalreporter.section("failures that were tried, and what was lost")
        for name, count in sorted(_sums.items(), key=lambda one: one[0].removeprefix(PREFIX) in LOSSES):
            terminalreporter.line(f"{count:9,}  {name.removeprefix(PREFIX)}")
