"""`qpref losses`"""

from __future__ import annotations

import json
import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click

from qpref.cli.options import json_option

if TYPE_CHECKING:
    from qpref.hooks.manager import Offer, PluginHost
    from qpref.testing import Result


SCOPES = {"example": "example by example", "step": "all examples of a step at once"}


@click.group("losses", invoke_without_command=True)
@json_option
@click.pass_context
def command(ctx: click.Context, as_json: bool) -> None:
    """List the installed losses, show one, or check them against their contract.

    Paired losses train on pairs of a chosen and a rejected response, unpaired losses on single completions that are
    desirable or undesirable.
    """
    if ctx.invoked_subcommand is not None:
        return
    from qpref.hooks.manager import PluginHost

    host = PluginHost()
    losses = [_listed(host, offer) for offer in _offers(host)]
    if as_json:
        click.echo(json.dumps(losses, indent=2))
        return
    rows = [("NAME", "DATA", "DISTRIBUTION", "SUMMARY")]
    for loss in losses:
        summary = loss["summary"] if loss["error"] is None else f"cannot be loaded: {loss['error']}"
        rows.append((loss["name"], loss["kind"] or "?", f"{loss['distribution']} {loss['version']}", summary))
    _print_table(rows)


@command.command("show")
@click.argument("name")
def show(name: str) -> None:
    """Print a loss's formula, paper, options and needs."""
    from qpref.errors import PluginError
    from qpref.hooks.manager import LOSS, PluginHost

    loaded = PluginHost().load(LOSS, name)
    record = loaded.record
    try:
        facts = {"from": str(loaded.offer)} | _facts(record)
    except (Exception, SystemExit) as error:
        what = f"{loaded.offer}: its record raised {type(error).__name__}: {error}"
        raise PluginError(what, f"see qpref losses check {name}") from error
    click.echo(f"{record.name}: {record.summary}\n")
    for title, fact in facts.items():
        if fact:
            click.echo(textwrap.fill(fact, 100, initial_indent=f"{title:<11}", subsequent_indent=" " * 11))
    for option, field in record.options.model_fields.items():
        default = "required" if field.is_required() else f"default {_toml(field.default)}"
        click.echo(f"\n{option}: {_type(field.annotation)}, {default}")
        click.echo(textwrap.fill(field.description or "", 100, initial_indent="    ", subsequent_indent="    "))


def _facts(record: Any) -> dict[str, str]:
    """Collect the facts of a loss's record, by title."""
    from qpref.testing import options_tables

    tables = [(table, record.options.model_validate(dict(table))) for table in options_tables(record)]
    needs = [", ".join(sorted(record.needs_of(options))) or "nothing" for _, options in tables]
    starts = [None if record.starts_at is None else record.starts_at(options) for _, options in tables]
    return {
        "data": _kind(record),
        "formula": record.formula,
        "paper": record.paper,
        "needs": _by_options(tables, needs),
        "scope": _by_options(tables, [SCOPES[record.scope_of(options)] for _, options in tables]),
        "starts at": _by_options(tables, ["no constant" if start is None else f"{start:.6g}" for start in starts]),
    }


@command.command("check")
@click.argument("names", metavar="[NAME]...", nargs=-1)
def check(names: tuple[str, ...]) -> None:
    """Check losses against their contract: the named ones, or all that are installed.

    Prints every rule of a loss that is named or breaks one. Exits with 6 if a rule is broken.
    """
    import torch

    from qpref.errors import PluginError
    from qpref.hooks.manager import LOSS, PluginHost
    from qpref.testing import check_loss

    torch.set_num_threads(1)  # a second thread costs more than it saves on tensors this small
    host = PluginHost()
    for name in names:
        host.find(LOSS, name)
    wanted = dict.fromkeys(names or [offer.name for offer in _offers(host)])
    broken = {}
    for name in wanted:
        try:
            loaded = host.load(LOSS, name)
        except PluginError as error:
            broken[name] = error.what
            click.echo(f"{name}: cannot be loaded")
            continue
        results = check_loss(loaded.record)
        rules = dict.fromkeys(result.rule for result in results if result.status == "broken")
        if rules:
            broken[name] = f"loss '{name}' ({loaded.offer}) breaks: {', '.join(rules)}"
        _print_results(loaded.offer, results, in_full=bool(names or rules))
    if broken:
        head = [f"{len(broken)} of {len(wanted)} losses cannot be relied on"] if len(wanted) > 1 else []
        lines = [f"  {line}" if head else line for line in broken.values()]
        disabled = ",".join(f"loss-{name}" for name in broken)
        raise PluginError(
            "\n".join(head + lines), f"report it to the plugin's author; QPREF_DISABLE={disabled} leaves it out"
        )


def _offers(host: PluginHost) -> list[Offer]:
    from qpref.hooks.manager import LOSS

    return [offer for offer in host.offers if offer.kind == LOSS.prefix]


def _listed(host: PluginHost, offer: Offer) -> dict[str, Any]:
    from qpref.errors import PluginError
    from qpref.hooks.manager import LOSS

    listed = {"name": offer.name, "kind": None, "distribution": offer.distribution, "version": offer.version}
    try:
        record = host.load(LOSS, offer.name).record
    except PluginError as error:
        return listed | {"summary": None, "error": " ".join(error.what.split())}
    return listed | {"kind": _kind(record), "summary": record.summary, "error": None}


def _kind(record: Any) -> str:
    from qpref.hooks.types import UnpairedLoss

    return "unpaired" if isinstance(record, UnpairedLoss) else "paired"


def _by_options(tables: Sequence[tuple[Any, Any]], values: Sequence[str]) -> str:
    """Join the value with the default options, and the differing values with the tables that cause them."""
    others = [
        f"{value} with {_table(table)}" for (table, _), value in zip(tables, values, strict=True) if value != values[0]
    ]
    return "; ".join([values[0], *others])


def _print_results(offer: Offer, results: Sequence[Result], in_full: bool) -> None:
    """Print one line for the loss, and with `in_full` one per rule and result, with the option tables it holds for."""
    tables = {_table(result.options) for result in results}
    is_broken = any(result.status == "broken" for result in results)
    count = f"{len(tables)} set{'s' if len(tables) > 1 else ''} of options"
    click.echo(f"{offer.name} ({offer}): {'broken' if is_broken else 'ok'}, {count}")
    if not in_full:
        return
    rows = []
    for rule in dict.fromkeys(result.rule for result in results):
        outcomes: dict[tuple[str, str], list[str]] = {}
        for result in results:
            if result.rule == rule:
                outcomes.setdefault((result.status, result.message), []).append(_table(result.options))
        for (status, message), where in outcomes.items():
            options = "" if len(where) == len(tables) else f"with {'; '.join(where)}"
            word = {"passed": "ok", "broken": "BROKEN"}.get(status, status)
            rows.append((f"  {rule}", word, ": ".join(part for part in (options, message) if part)))
    _print_table(rows)


def _print_table(rows: Sequence[Sequence[str]]) -> None:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        click.echo("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def _table(options: Any) -> str:
    return ", ".join(f"{key} = {_toml(value)}" for key, value in options.items()) or "the defaults"


def _toml(value: object) -> str:
    return "none" if value is None else json.dumps(value, default=str)


def _type(annotation: Any) -> str:
    """Name a type in the words of a recipe's author."""
    import types
    from typing import Literal, Union, get_args, get_origin

    origin, arms = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return " or ".join(_toml(arm) for arm in arms)
    if origin in (Union, types.UnionType):
        return " or ".join(_type(arm) for arm in arms if arm is not type(None))
    if origin is list:
        return f"list of {_type(arms[0])}"
    if hasattr(annotation, "__metadata__"):
        return _type(annotation.__origin__)
    return {str: "text", int: "whole number", float: "number", bool: "true or false"}.get(annotation, str(annotation))
