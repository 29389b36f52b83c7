"""Rules of validators: findings as the core needs them, the same in every pass, and no state between two starts."""

from __future__ import annotations

import copy
import tracemalloc
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from qpref.hooks.contract import finding_problem
from qpref.hooks.types import RowCheck, Validator
from qpref.records import Finding
from qpref.testing.calls import BrokenRule, attempt
from qpref.testing.example_rows import SplitExample, completions_alone, examples, long_examples, pairs_alone

NUM_LONG, LONG_CHARACTERS = 20, 20_000
KEPT_SHARE = 0.25
"""Growth for each row, as a share of its text, from which on a check is taken to keep texts."""


@dataclass(frozen=True, slots=True)
class StartableValidator:
    """A validator and its options."""

    record: Validator
    options: Any

    def start(self) -> RowCheck:
        check = attempt("start", self.record.start, self.options)
        for method in ("look", "finish"):
            if not callable(getattr(check, method, None)):
                raise BrokenRule(f"start returns {type(check).__name__}, which has no method {method}")
        return check  # type: ignore[no-any-return]

    def findings(self, given: Iterable[SplitExample], check: RowCheck | None = None) -> list[Finding]:
        """Start the check, unless one is given, show it the examples, and return all of its findings."""
        check = self.start() if check is None else check
        found = []
        for example, split in given:
            found += _listed(f"look at {example.source}", check.look, example, split)
        return found + _listed("finish", check.finish)


def _listed(what: str, method: Callable[..., Any], *arguments: Any) -> list[Finding]:
    """Call a check's method as the core does, and return its findings."""
    yielded = attempt(what, method, *arguments)
    if yielded is None:
        raise BrokenRule(f"{what} returned None, not findings; return () where there are none")
    found: list[Finding] = attempt(what, list, yielded)
    for finding in found:
        if problem := finding_problem(finding):
            raise BrokenRule(f"{what} yields {problem}")
    return found


def check_record(validator: StartableValidator) -> None:
    """Fields of the record have the right types, and `start` returns a new check each time."""
    if validator.start() is validator.start():
        raise BrokenRule("start returns the same object twice; make a new check in each call")


def check_findings(validator: StartableValidator) -> None:
    """Findings name rows that it was shown, or a whole file."""
    given = examples()
    known = {example.source for example, _ in given}
    paths = {source.path for source in known}
    for finding in validator.findings(given):
        source = finding.source
        if source.path not in paths or (source.line and source not in known):
            raise BrokenRule(f"a finding '{finding.code}' is about {source}, which no example came from")


def check_any_data(validator: StartableValidator) -> None:
    """No kind of data makes it raise: no row, pairs alone, completions alone, one split alone."""
    for given in ([], pairs_alone(), completions_alone()):
        validator.findings(given)
    for split in ("heldout", "train"):
        validator.findings([one for one in examples() if one[1] == split])


def check_repeatable(validator: StartableValidator) -> None:
    """The same data give the same findings, in the same order."""
    first, again = validator.findings(examples()), validator.findings(examples())
    if first != again:
        raise BrokenRule(f"the same data gave {_counts(first)}, then {_counts(again)}")


def check_stateless(validator: StartableValidator) -> None:
    """A check that is started knows nothing of another that was, also while that one works."""
    expected = validator.findings([])
    busy, idle = validator.start(), validator.start()
    validator.findings(examples(), busy)
    found = validator.findings([], idle)
    if found != expected:
        raise BrokenRule(f"a check without a row gave {_counts(found)} after another had seen some; keep state in self")


def check_input(validator: StartableValidator) -> None:
    """Examples are the same afterwards, with the dicts inside them."""
    given = examples()
    before = copy.deepcopy(given)
    validator.findings(given)
    changed = [old for (old, _), (new, _) in zip(before, given, strict=True) if old != new]
    if changed:
        raise BrokenRule(f"it changed the example of {changed[0].source}; the next check and training see that")


def check_memory(validator: StartableValidator) -> None:
    """Texts aren't kept: data files are larger than memory."""
    check, kept = validator.start(), []
    tracemalloc.start()
    try:
        for number, one in enumerate(long_examples(2 * NUM_LONG, LONG_CHARACTERS), 1):
            _listed("look", check.look, *one)
            if number % NUM_LONG == 0:
                kept.append(tracemalloc.get_traced_memory()[0])
    finally:
        tracemalloc.stop()
    # What it imports and caches once is in the first half.
    growth = (kept[1] - kept[0]) / NUM_LONG
    if growth > KEPT_SHARE * LONG_CHARACTERS:
        share = f"{growth:,.0f} bytes a row of {LONG_CHARACTERS:,} characters"
        raise BrokenRule(f"it keeps {share}; keep hashes or counts")


def _counts(found: list[Finding]) -> str:
    return f"{len(found)} findings ({', '.join(sorted({finding.code for finding in found})) or 'none'})"


VALIDATOR_RULES: Mapping[str, Callable[[StartableValidator], None]] = {
    "record": check_record,
    "findings": check_findings,
    "any_data": check_any_data,
    "repeatable": check_repeatable,
    "stateless": check_stateless,
    "input": check_input,
    "memory": check_memory,
}
