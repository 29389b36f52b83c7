"""Conformance tests for a plugin's own test suite; `qpref losses check` and `qpref plugins check` run the same rules.

    import pytest
    from qpref.testing import RULES, assert_conforms
    from acme_losses import qpref_losses

    @pytest.mark.parametrize("rule", RULES)
    @pytest.mark.parametrize("record", list(qpref_losses()), ids=lambda record: record.name)
    def test_loss_conforms(record, rule):
        assert_conforms(record, rule)

Each rule is checked under the loss's default options and under each of its `variants`. The inputs are synthetic,
deterministic, and float64 unless a rule says otherwise; no model and no data are needed.

Validators, readers, metric sinks and rewards have `VALIDATOR_RULES`, `READER_RULES`, `SINK_RULES` and `REWARD_RULES`,
each rule a function whose docstring says what holds. A reader needs a sample: `assert_conforms(record, sample=path)`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from qpref.hooks import Options
from qpref.hooks.reader import Reader
from qpref.hooks.reward import Reward
from qpref.hooks.types import Loss, MetricSink, Validator
from qpref.testing.advice import advice_on
from qpref.testing.calls import BrokenRule, NotApplicable
from qpref.testing.plugins import NOUNS, check_plugin
from qpref.testing.reader_rules import READER_RULES
from qpref.testing.results import Result, results_of
from qpref.testing.reward_rules import REWARD_RULES
from qpref.testing.rules import PREREQUISITES, RULES
from qpref.testing.sink_rules import SINK_RULES
from qpref.testing.tables import options_tables
from qpref.testing.validator_rules import VALIDATOR_RULES

__all__ = [
    "READER_RULES",
    "REWARD_RULES",
    "RULES",
    "SINK_RULES",
    "VALIDATOR_RULES",
    "BrokenRule",
    "NotApplicable",
    "Result",
    "assert_conforms",
    "check_loss",
    "check_plugin",
    "options_tables",
]


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
    return results_of({rule: partial(RULES[rule], record, options) for rule in rules}, table, PREREQUISITES)


def assert_conforms(
    record: Loss | Validator | Reader | MetricSink | Reward,
    *rules: str,
    options: Mapping[str, object] | None = None,
    sample: Path | str | None = None,
) -> None:
    """Raise an AssertionError that lists each broken rule, among the named ones or all.

    Args:
        options: as for `check_plugin`; a loss is checked with its defaults and its variants.
        sample: as for `check_plugin`.
    """
    if isinstance(record, Loss):
        noun, results = "loss", check_loss(record, *rules)
    else:
        noun, results = NOUNS[type(record)], check_plugin(record, *rules, options=options, sample=sample)
    lines = []
    for result in results:
        if result.status == "broken":
            lines.append(f"  {result.rule} (options {dict(result.options)}): {result.message}")
            lines += [f"    {advice_on(result)}"] if isinstance(record, Loss) else []
    if lines:
        raise BrokenRule("\n".join([f"{noun} '{record.name}' breaks its contract", *lines]))
