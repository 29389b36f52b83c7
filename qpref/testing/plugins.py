"""Conformance checks of plugins that aren't losses: validators, readers, metric sinks and rewards."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from qpref.hooks.contract import record_problem
from qpref.hooks.reader import Reader
from qpref.hooks.reward import Reward
from qpref.hooks.types import MetricSink, Validator
from qpref.testing.reader_rules import READER_RULES, SampledReader
from qpref.testing.results import Result, results_of
from qpref.testing.reward_rules import REWARD_RULES, BuildableReward
from qpref.testing.sink_rules import SINK_RULES, OpenableSink
from qpref.testing.validator_rules import VALIDATOR_RULES, StartableValidator

NOUNS: Mapping[type, str] = {Validator: "validator", Reader: "reader", MetricSink: "metric sink", Reward: "reward"}
PREREQUISITES = ("record", "rows")
"""Rules without which the later ones of the same plugin can't be checked."""


def check_plugin(
    record: Validator | Reader | MetricSink | Reward,
    *rules: str,
    options: Mapping[str, object] | None = None,
    sample: Path | str | None = None,
) -> list[Result]:
    """Check the named rules of a plugin's kind, or all of them.

    Args:
        options: the plugin's table as in a recipe; its defaults where there is none.
        sample: for a reader, data that it reads: a file, a folder, or a name for one that takes names. Without it, the
            rules that need one are skipped. Relative paths in its options start at the sample's folder.
    """
    table = dict(options or {})
    if problem := record_problem(record):
        return [Result(rule="record", options=table, status="broken", message=problem)]
    try:
        parsed = None if record.options is None else record.options.model_validate(table)
    except ValueError as error:
        return [Result(rule="options", options=table, status="broken", message=" ".join(str(error).split()))]
    if record.options is None and table:
        return [Result(rule="options", options=table, status="broken", message="it has no options")]
    known = _rules_of(record, parsed, None if sample is None else Path(sample))
    chosen = {rule: known[rule] for rule in rules or known}
    return results_of(chosen, table, PREREQUISITES)


def _rules_of(record: Any, options: Any, sample: Path | None) -> dict[str, Callable[[], None]]:
    if isinstance(record, Validator):
        validator = StartableValidator(record, options)
        return {name: partial(rule, validator) for name, rule in VALIDATOR_RULES.items()}
    if isinstance(record, MetricSink):
        sink = OpenableSink(record, options)
        return {name: partial(rule, sink) for name, rule in SINK_RULES.items()}
    if isinstance(record, Reward):
        reward = BuildableReward(record, options)
        return {name: partial(rule, reward) for name, rule in REWARD_RULES.items()}
    assert isinstance(record, Reader)
    folder = Path.cwd() if sample is None or record.takes == "name" else sample.absolute().parent
    reader = SampledReader(record, options, sample, folder)
    return {name: partial(rule, reader) for name, rule in READER_RULES.items()}
