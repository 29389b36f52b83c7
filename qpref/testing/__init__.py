"""Conformance tests for losses, for a plugin's own test suite; `qpref losses check` runs the same rules.

    import pytest
    from qpref.testing import RULES, assert_conforms
    from acme_losses import qpref_losses

    @pytest.mark.parametrize("rule", RULES)
    @pytest.mark.parametrize("record", list(qpref_losses()), ids=lambda record: record.name)
    def test_loss_conforms(record, rule):
        assert_conforms(record, rule)

Each rule is checked under the loss's default options and under each of its `variants`. The inputs are synthetic,
deterministic, and float64 unless a rule says otherwise; no model and no data are needed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from qpref.hooks import Options
from qpref.hooks.types import Loss
from qpref.testing.calls import BrokenRule, NotApplicable
from qpref.testing.rules import PREREQUISITES, RULES

__all__ = ["RULES", "BrokenRule", "NotApplicable", "Result", "assert_conforms", "check_loss", "options_tables"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """Outcome of one rule under one table of options; `message` is empty where it holds."""

    rule: str
    options: Mapping[str, object]
    status: Literal["passed", "broken", "skipped"]
    message: str = ""


def check_loss(record: Loss, *rules: str) -> list[Result]:
    """Check the named rules, or all of them, and return a result per table of options and rule.

    Where a loss cannot be called as the core calls it, the remaining rules are skipped.
    """
    chosen = rules or tuple(RULES)
    if not (isinstance(record.options, type) and issubclass(record.options, Options)):
        message = f"its options are {record.options!r}, not a qpref.hooks.Options"
        return [Result(rule="record", options={}, status="broken", message=message)]
    results = []
    for table in options_tables(record):
        try:
            options = record.options.model_validate(table)
        except ValueError as error:
            message = f"refuses these options itself: {' '.join(str(error).split())}"
            results.append(Result(rule="record", options=table, status="broken", message=message))
            continue
        results += _check_with(record, options, table, chosen)
    return results


def _check_with(record: Loss, options: Any, table: Mapping[str, object], rules: Iterable[str]) -> list[Result]:
    results: list[Result] = []
    blocked = ""
    for rule in rules:
        if blocked:
            results.append(Result(rule=rule, options=table, status="skipped", message=f"'{blocked}' is broken"))
            continue
        try:
            RULES[rule](record, options)
        except BrokenRule as error:
            results.append(Result(rule=rule, options=table, status="broken", message=str(error)))
            blocked = rule if rule in PREREQUISITES else ""
        except NotApplicable as error:
            results.append(Result(rule=rule, options=table, status="skipped", message=str(error)))
        else:
            results.append(Result(rule=rule, options=table, status="passed"))
    return results


def assert_conforms(record: Loss, *rules: str) -> None:
    """Raise an AssertionError that lists each broken rule, among the named ones or all."""
    broken = [result for result in check_loss(record, *rules) if result.status == "broken"]
    lines = [f"  {result.rule} (options {dict(result.options)}): {result.message}" for result in broken]
    if broken:
        raise BrokenRule("\n".join([f"loss '{record.name}' breaks its contract", *lines]))


def options_tables(record: Loss) -> list[Mapping[str, object]]:
    """List the options to check a loss with: its defaults, if every option has one, and its variants."""
    complete = not any(field.is_required() for field in record.options.model_fields.values())
    return [*([{}] if complete or not record.variants else []), *record.variants]
