"""A run's outcome: its state, its verdict and held-out numbers, and what was trained, from the files of its folder."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from qpref.report.cells import MAX_LABEL, cell_text
from qpref.report.read import RunRecord, is_number, nested, number
from qpref.report.shares import Share
from qpref.report.text import bounded, count_text, number_text

ACCURACIES = ("rewards/accuracies", "logps/accuracies")
"""Held-out accuracies, the first of which a run has is its accuracy."""
MEASURES = {"rewards/accuracies": "by reward margin", "logps/accuracies": "by log-probability"}
MAX_OPTIONS = 8


def state(run: RunRecord) -> str:
    """Describe the run's progress and its adapter's step."""
    steps = run.facts.get("steps")
    total = f" of {count_text(number(steps))}" if not math.isnan(number(steps)) else ""
    step = f"step {run.metrics.last_step:,}{total}"
    if adapter_step(run) != run.metrics.last_step:
        step += f", adapter of step {adapter_step(run):,}"
    return f"finished, {step}" if run.is_finished else f"not finished, {step}"


def adapter_step(run: RunRecord) -> int:
    """Return the adapter's step: the last one, or the best one with `best_by`."""
    step = number(nested(run.result, "adapter_step"))
    return run.metrics.last_step if math.isnan(step) else int(step)


def heldout_value(run: RunRecord, name: str) -> float:
    """Return the held-out mean at the adapter's step; the newest where that step has none, NaN without any."""
    column = run.metrics.column("eval", name)
    values = dict(zip(column.steps, column.values, strict=True)) if column else {}
    return values.get(adapter_step(run), run.metrics.last("eval", name))


def accuracy_name(run: RunRecord) -> str:
    """Return the metric that is the run's held-out accuracy: by reward, else by log-probability."""
    return next((name for name in ACCURACIES if run.metrics.column("eval", name)), ACCURACIES[0])


def accuracy(run: RunRecord) -> Share:
    """Return the held-out accuracy at the adapter's step."""
    return Share(heldout_value(run, accuracy_name(run)), heldout_count(run))


def accuracy_column(runs: Sequence[RunRecord]) -> tuple[str, list[str]]:
    """Name the measure of several runs' accuracies for a table's head, and format each; in a table of runs with
    different measures each cell names its own, and the head none."""
    measures = [MEASURES[accuracy_name(run)] for run in runs]
    same = measures[0] if len(set(measures)) == 1 else ""
    return same, [
        f"{accuracy(run)}" if same else f"{accuracy(run)} {own}" for run, own in zip(runs, measures, strict=True)
    ]


def heldout_count(run: RunRecord) -> float:
    """Return the number of held-out examples; NaN where run.json doesn't have it."""
    return number(nested(run.facts, "examples", "heldout"))


def tokens_and_seconds(run: RunRecord) -> tuple[float, float]:
    """Return tokens fed and seconds passed in training."""
    return run.metrics.last("train", "tokens"), run.metrics.last("train", "seconds")


def verdict(run: RunRecord) -> str:
    """Return one sentence on what training has changed: the run's own, or its held-out accuracy with an interval."""
    own = nested(run.result, "verdict", "sentence")
    if isinstance(own, str) and own:
        return bounded(own)
    name = accuracy_name(run)
    column = run.metrics.column("eval", name)
    if column is None:
        is_coming = heldout_count(run) > 0 and not run.is_finished
        return "no held-out rows yet" if is_coming else "no held-out data, so nothing tells what was learned"
    share = accuracy(run)
    before = f"{column.values[0]:.2f} → " if len(column) > 1 and math.isfinite(column.values[0]) else ""
    of = f" of {share.count_text}" if share.count > 0 else ""
    low, high = share.interval
    interval = f" (95 % interval {low:.2f} to {high:.2f})" if math.isfinite(low) else ""
    value = f"{share.value:.2f}" if math.isfinite(share.value) else "unknown"
    so_far = "" if run.is_finished else "so far, "
    return f"{so_far}held-out accuracy {before}{value}{of}{interval}"


def trained(run: RunRecord) -> list[tuple[str, str]]:
    """Name what was trained: loss with its numbers, learning rate, rank, data, base."""
    tables = run.recipe.get("loss")
    losses = [part for part in (tables if isinstance(tables, list) else [tables]) if isinstance(part, dict)]
    given = nested(run.facts, "losses", "given")
    shown = given if _are_lists(given) and len(given) == len(losses) else [None] * len(losses)
    train, heldout = (number(nested(run.facts, "examples", split)) for split in ("train", "heldout"))
    data = f"{count_text(train)} examples" if train >= 0 else ""
    data += f", {count_text(heldout)} held out" if data and heldout > 0 else ""
    model, adapter = (run.recipe.get(name) for name in ("model", "adapter"))
    facts = {
        "loss": " + ".join(map(_loss, losses, shown)),
        "learning rate": _text(nested(run.recipe, "train", "learning_rate")),
        "batch size": _text(nested(run.recipe, "train", "batch_size")),
        "rank": _text(nested(run.recipe, "adapter", "rank")) if isinstance(adapter, dict) else "",
        "data": data,
        "base": _text(run.facts.get("base")),
        "quantization": _text(nested(run.recipe, "model", "quantization")) if isinstance(model, dict) else "",
    }
    return [(name, value) for name, value in facts.items() if value]


def _are_lists(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(part, list) for part in value)


def _loss(table: Mapping[str, Any], given: Any) -> str:
    """Describe a loss with its options that are numbers other than 0, of which a schedule has two.

    Args:
        given: names of the options that the recipe set; None where run.json doesn't have them, and all are shown.
    """
    set_by_recipe = {name: table[name] for name in table if given is None or name == "weight" or name in given}
    numbers = [f"{bounded(name, MAX_LABEL)} {text}" for name, text in _numbers(set_by_recipe)][:MAX_OPTIONS]
    return ", ".join([cell_text(table.get("name")), *numbers])


def _numbers(table: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for name, value in table.items():
        start, end = nested(table, name, "start"), nested(table, name, "end")
        if is_number(start) and is_number(end):
            yield name, f"{number_text(number(start))} → {number_text(number(end))}"
        elif is_number(value) and value:
            yield name, number_text(number(value))


def _text(value: Any) -> str:
    return "" if value is None else cell_text(value)


def as_json(run: RunRecord) -> dict[str, Any]:
    """Convert a run's outcome to JSON values; an unknown number is None."""
    share = accuracy(run)
    low, high = share.interval
    tokens, seconds = tokens_and_seconds(run)
    return {
        "run": str(run.path),
        "finished": run.is_finished,
        "step": run.metrics.last_step,
        "steps": _known(number(run.facts.get("steps"))),
        "created": run.facts.get("created"),
        "trained": dict(trained(run)),
        "verdict": verdict(run),
        "outcome": nested(run.result, "verdict", "outcome"),
        "accuracy": {
            "value": _known(share.value),
            "low": _known(low),
            "high": _known(high),
            "examples": _known(share.count),
        },
        "margin": _known(heldout_value(run, "rewards/margins")),
        "loss": _known(heldout_value(run, "loss")),
        "tokens": _known(tokens),
        "seconds": _known(seconds),
    }


def _known(value: float) -> float | None:
    return value if math.isfinite(value) else None
