"""`qpref eval`"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from qpref.cli.gate_text import run_gate
from qpref.cli.options import base_option, json_option, quantization_option
from qpref.cli.output import echo, make_report_console, numbers_table

if TYPE_CHECKING:
    from rich.table import Table

    from qpref.evaluation.comparison import ComparedModel, Comparison
    from qpref.evaluation.statistics import Estimate

OF_PAIRS = ("data", "beta", "max_pairs", "max_length", "without_overlap")
OF_GATE = ("gate", "gate_items", "strict")


@click.command("eval")
@click.argument("models", metavar="MODEL...", nargs=-1, required=True)
@click.option(
    "--data", metavar="DATA", help="Pairs, as in [data] train: a file, ...  [default: the first run's held-out pairs]"
)
@json_option
@click.option(
    "--beta",
    type=click.FloatRange(min=0, min_open=True),
    help="Scale of implicit rewards: beta times the log-ratio to the reference.  [default: the first run's, else 0.1]",
)
@click.option(
    "--samples", type=click.IntRange(min=1), default=2000, show_default=True, help="Number of bootstrap samples."
)
@click.option(
    "--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Seed for bootstrap and sampling."
)
@click.option("--max-pairs", type=click.IntRange(min=1), help="Largest number of pairs; more are sampled at random.")
@click.option(
    "--max-length",
    type=click.IntRange(min=2),
    help="Most tokens of prompt and response; longer pairs are left out.  [default: the first run's]",
)
@click.option(
    "--float32", "all_float32", is_flag=True, help="Compute in float32 even if all models have the same 16-bit dtype."
)
@click.option("--without-overlap", is_flag=True, help="Leave out pairs whose prompt is in a run's training data.")
@click.option(
    "--gate",
    is_flag=True,
    help="Compare what each MODEL and its base know, on a built-in regression set, instead of preferences.",
)
@click.option("--gate-items", metavar="DATA", help="Pairs to use in place of the built-in regression set; with --gate.")
@click.option("--strict", is_flag=True, help="With --gate: exit with 14 where a model has lost significantly.")
@base_option
@quantization_option
def command(models: tuple[str, ...], as_json: bool, **asked: Any) -> None:
    """Compare the preferences of each MODEL on held-out pairs: runs, their checkpoints, adapters, merged models, bases.

    The reference of a run or an adapter is its base with the adapter off; a model without an adapter takes the first
    such reference. Brackets hold 95 % bootstrap intervals over prompts; differences are over the same pairs. Three
    rows come first, with what they say; below 20 pairs they say nothing.
    """
    from qpref.cli import quiet_transformers
    from qpref.evaluation.evaluate import Request, evaluate

    quiet_transformers()
    of_gate = {name: asked.pop(name) for name in OF_GATE}
    if of_gate["gate"]:
        _refuse_options(OF_PAIRS, "pairs, which --gate doesn't read")
        options = {name: value for name, value in asked.items() if name not in OF_PAIRS}
        run_gate(models, as_json, of_gate["gate_items"], of_gate["strict"], options)
        return
    _refuse_options(OF_GATE, "the regression set, which only --gate reads")
    report = evaluate(Request(models=models, **asked))
    if as_json:
        echo(json.dumps(report.as_json(), indent=2, allow_nan=False))
    else:
        _print(report)


def _refuse_options(names: Sequence[str], concern: str) -> None:
    """Refuse options that were given and would do nothing."""
    context = click.get_current_context()
    given = [name for name in names if context.get_parameter_source(name) is ParameterSource.COMMANDLINE]
    if given:
        listed = ", ".join(f"--{name.replace('_', '-')}" for name in given)
        raise click.UsageError(f"{listed}: about {concern}", context)


def _print(report: Comparison) -> None:
    from qpref.evaluation.conclusion import conclusions, lead_keys
    from qpref.evaluation.summary import labels

    console = make_report_console()
    console.print(f"data       {report.data}: {report.pairs} pairs")
    console.print(f"beta       {report.beta:g} ({report.beta_from})")
    for model in report.models:
        against = f"rewards against the reference of {model.reference}" if model.reference else "no reference"
        console.print(f"{model.kind:10} {model.name}: {against}")
    lead = lead_keys(report.models)
    console.print(_metrics_table("held-out pairs", report.models, lead))
    for sentence in conclusions(report.models):
        console.print(sentence)
    console.print(_metrics_table("all metrics", report.models, [key for key in labels() if key not in lead]))
    for kind in report.models[0].summary.buckets:
        console.print(_bucket_table(kind, report.models))
    if len(report.models) > 1:
        console.print(_difference_table(report.models))
    for warning in report.warnings():
        echo(f"warning: {warning}", err=True)


def _metrics_table(title: str, models: Sequence[ComparedModel], keys: Sequence[str]) -> Table:
    from qpref.evaluation.summary import labels

    table = numbers_table(title, [model.name for model in models])
    for key in keys:
        found = [model.summary.metrics.get(key) for model in models]
        if any(found):
            table.add_row(labels()[key], *(_cell(estimate) for estimate in found))
    return table


def _bucket_table(kind: str, models: Sequence[ComparedModel]) -> Table:
    """Tabulate the accuracy in each bucket, by implicit reward where the model has a reference."""
    table = numbers_table(f"accuracy by {kind}", ["pairs", *(model.name for model in models)])
    for name in models[0].summary.buckets[kind]:
        cells, pairs = [], 0
        for model in models:
            found = model.summary.buckets[kind][name]
            estimate = found.get("rewards/accuracies") or found["logps/accuracies"]
            pairs = estimate.pairs
            cells.append(_cell(estimate))
        table.add_row(name, str(pairs), *cells)
    return table


def _difference_table(models: Sequence[ComparedModel]) -> Table:
    from qpref.evaluation.summary import METRICS

    table = numbers_table(f"difference from {models[0].name}, pair by pair", [model.name for model in models[1:]])
    for key, metric in METRICS.items():
        found = [model.summary.differences.get(key) for model in models[1:]]
        if any(found):
            table.add_row(metric.label, *(_cell(estimate, signed=True) for estimate in found))
    return table


def _cell(estimate: Estimate | None, signed: bool = False) -> str:
    """Format a number and its interval with enough digits to tell models apart."""
    if estimate is None or math.isnan(estimate.value):
        return "-"
    plus = "+" if signed else ""
    digits = 2 if abs(estimate.value) >= 100 else 3
    value, low, high = (
        format(number, f"{plus}z.{digits}f") for number in (estimate.value, estimate.low, estimate.high)
    )
    return f"{value} ({low} to {high})"
