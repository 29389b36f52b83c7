"""Results of conformance rules, and the order in which they are checked."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Literal

from qpref.testing.calls import BrokenRule, NotApplicable


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """Outcome of one rule under one table of options; `message` is empty where it holds."""

    rule: str
    options: Mapping[str, object]
    status: Literal["passed", "broken", "skipped"]
    message: str = ""


def results_of(
    rules: Mapping[str, Callable[[], None]], options: Mapping[str, object], prerequisites: Collection[str]
) -> list[Result]:
    """Check the rules in order; once a prerequisite is broken, the remaining ones are skipped."""
    results: list[Result] = []
    blocked = ""
    for rule, check in rules.items():
        if blocked:
            results.append(Result(rule=rule, options=options, status="skipped", message=f"'{blocked}' is broken"))
            continue
        try:
            check()
        except BrokenRule as error:
            results.append(Result(rule=rule, options=options, status="broken", message=str(error)))
            blocked = rule if rule in prerequisites else ""
        except NotApplicable as error:
            results.append(Result(rule=rule, options=options, status="skipped", message=str(error)))
        else:
            results.append(Result(rule=rule, options=options, status="passed"))
    return results
