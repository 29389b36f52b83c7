"""`qpref eval --gate`: run the forgetting gate and print its tables"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from qpref.cli.output import echo, make_report_console, numbers_table
from qpref.errors import ForgettingError

if TYPE_CHECKING:
    from rich.table import Table

    from qpref.evaluation.forgetting import Change
    from qpref.evaluation.gate_report import GatedModel, GateReport

MOST_LOST = 5
"""Lost items that are printed; JSON has all."""


def run_gate(models: Sequence[str], as_json: bool, items: str | None, strict: bool, options: Mapping[str, Any]) -> None:
    """Run the gate and print its report.

    Raises:
        ForgettingError: with `strict`, a model has lost significantly.
    """
    from qpref.evaluation.gate import GateRequest, gate

    report = gate(GateRequest(models=models, items=items, **options))
    if as_json:
        echo(json.dumps(report.as_json(), indent=2, allow_nan=False))
    else:
        _print(report)
    if strict and report.forgets:
        named = ", ".join(model.name for model in report.models if model.forgets)
        raise ForgettingError(f"{named}: a significant loss of what the base knows")


def _print(report: GateReport) -> None:
    console = make_report_console()
    console.print(f"items      {report.items}: {report.read - report.left_out[0]}")
    for model in report.models:
        console.print(f"{model.kind:10} {model.name}: beside the base of {model.base}")
        console.print(_changes_table(model))
        for item in model.lost[:MOST_LOST]:
            console.print(f"lost       {item.category}: {item.prompt!r}: {item.right!r} against {item.wrong!r}")
        if not model.forgets:
            console.print(f"{model.name}: no significant loss")
    for warning in report.warnings():
        echo(f"warning: {warning}", err=True)


def _changes_table(model: GatedModel) -> Table:
    table = numbers_table(
        "probability of the right answer of two", ["items", "base", "trained", "difference", "lost", "gained", ""]
    )
    for name, change in model.changes.changes().items():
        value = change.difference
        table.add_row(
            name,
            str(change.items),
            f"{change.base.value:.3f}",
            f"{change.trained.value:.3f}",
            f"{value.value:+z.3f} ({value.low:+z.3f} to {value.high:+z.3f})",
            str(change.lost),
            str(change.gained),
            _remark(change),
        )
    return table


def _remark(change: Change) -> str:
    if change.is_loss:
        return "loss"
    return "base at chance" if change.at_chance else ""
