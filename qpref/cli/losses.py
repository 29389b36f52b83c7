"""`qpref losses`"""

from __future__ import annotations

import json
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from qpref.cli import completion
from qpref.cli.groups import SuggestingGroup
from qpref.cli.options import json_option
from qpref.cli.output import echo
from qpref.cli.tables import options_text, print_table, toml_text

if TYPE_CHECKING:
    from qpref.hooks.manager import Loaded, Offer, PluginHost
    from qpref.testing import Result


FILE = ".py"
SCOPES = {
    "example": "example by example",
    "mismatched": "example by example, with the step's mismatched completions",
    "step": "all examples of a step at once",
}


@click.group("losses", cls=SuggestingGroup, invoke_without_command=True)
@json_option
@click.pass_context
def command(ctx: click.Context, as_json: bool) -> None:
    """List, show or check the installed losses.

    Paired losses train on pairs of a chosen and a rejected response, unpaired losses on single completions, each
    desirable or undesirable.
    """
    if ctx.invoked_subcommand is not None:
        return
    from qpref.hooks.manager import PluginHost

    host = PluginHost()
    losses = [_listed(host, offer) for offer in _offers(host)]
    if as_json:
        echo(json.dumps(losses, indent=2))
        return
    rows = [("NAME", "DATA", "DISTRIBUTION", "SUMMARY")]
    for loss in losses:
        summary = loss["summary"] if loss["error"] is None else f"cannot be loaded: {loss['error']}"
        rows.append((loss["name"], loss["kind"] or "?", f"{loss['distribution']} {loss['version']}", summary))
    print_table(rows)


@command.command("show")
@click.argument("name", shell_complete=completion.losses)
@json_option
def show(name: str, as_json: bool) -> None:
    """Print a loss's formula, paper, options and needs."""
    from qpref.errors import PluginError
    from qpref.hooks.border import guarded
    from qpref.hooks.manager import LOSS, PluginHost

    loaded = PluginHost().load(LOSS, name)
    record = loaded.record

    def failure(what: str) -> PluginError:
        return PluginError(f"{loaded.offer}: {what}", f"see qpref losses check {name}")

    with guarded(str(loaded.offer), lambda error: failure(f"its record raised {error}"), failure):
        facts = {"from": str(loaded.offer)} | _facts(record)
    if as_json:
        named = {title.replace(" ", "_"): fact for title, fact in facts.items()}
        options = [_option(option, field) for option, field in record.options.model_fields.items()]
        echo(json.dumps({"name": record.name, "summary": record.summary} | named | {"options": options}, indent=2))
        return
    echo(f"{record.name}: {record.summary}\n")
    for title, fact in facts.items():
        if fact:
            echo(textwrap.fill(fact, 100, initial_indent=f"{title:<11}", subsequent_indent=" " * 11))
    for option, field in record.options.model_fields.items():
        default = "required" if field.is_required() else f"default {toml_text(field.default)}"
        echo(f"\n{option}: {_type(field.annotation)}, {default}")
        echo(textwrap.fill(field.description or "", 100, initial_indent="    ", subsequent_indent="    "))


def _option(name: str, field: Any) -> dict[str, Any]:
    """Return an option as JSON data; `default` is null where there is none, and where it is none."""
    return {
        "name": name,
        "type": _type(field.annotation),
        "required": field.is_required(),
        "default": None if field.is_required() else json.loads(json.dumps(field.default, default=str)),
        "description": field.description or "",
    }


def _facts(record: Any) -> dict[str, str]:
    """Facts of a loss's record, by title."""
    from qpref.testing import options_tables

    tables = [(table, record.options.model_validate(dict(table))) for table in options_tables(record)]
    needs = [", ".join(sorted(record.needs_of(options))) or "nothing" for _, options in tables]
    starts = [None if record.starts_at is None else record.starts_at(options) for _, options in tables]
    columns = [", ".join(record.columns_of(options)) or "none" for _, options in tables]
    return {
        "data": _kind(record),
        "formula": record.formula,
        "paper": record.paper,
        "needs": _by_options(tables, needs),
        **({"columns": _by_options(tables, columns)} if set(columns) != {"none"} else {}),
        "scope": _by_options(tables, [SCOPES[record.scope_of(options)] for _, options in tables]),
        "starts at": _by_options(tables, ["no constant" if start is None else f"{start:.6g}" for start in starts]),
    }


@command.command("check")
@click.argument("names", metavar="[NAME]...", nargs=-1, shell_complete=completion.losses)
@click.option(
    "--against",
    type=click.Choice(["trl"]),
    help="Compare values and gradients with the installed TRL instead, on random log-probabilities.",
)
@json_option
def check(names: tuple[str, ...], against: str | None, as_json: bool) -> None:
    """Check losses against their contract: the named ones, or all that are installed.

    A NAME that ends in .py is a file: all losses in it are checked.

    Prints each rule for a loss that is named or breaks one. With --against trl it prints how far each loss is from
    TRL's, under one or more configurations; without a NAME, for each loss that TRL has.

    Exits with 6 if a loss breaks a rule, or differs from TRL's and its record doesn't say why.
    """
    import torch

    from qpref.cli.loss_comparison import compare_losses
    from qpref.hooks.manager import PluginHost

    torch.set_num_threads(1)  # tensors this small lose more to a second thread than it computes
    losses = _load(PluginHost(), names)
    if against is not None:
        compare_losses(losses, all_installed=not names, as_json=as_json)
    else:
        _check_contract(losses, all_installed=not names, as_json=as_json)


def _load(host: PluginHost, names: Sequence[str]) -> dict[str, Loaded | str]:
    """Load the named losses, those of the named files, or all: name -> the loss, or the error that its plugin raised.

    Raises:
        RecipeError: one of the names isn't installed, or a file doesn't exist or has no loss.
        PluginError: a file can't be executed.
    """
    from qpref.errors import PluginError
    from qpref.hooks.manager import LOSS

    listed = [loss for name in names for loss in (_losses_of_file(host, name) if name.endswith(FILE) else [name])]
    for name in listed:
        host.find(LOSS, name)
    losses: dict[str, Loaded | str] = {}
    for name in dict.fromkeys(listed or [offer.name for offer in _offers(host)]):
        try:
            losses[name] = host.load(LOSS, name)
        except PluginError as error:
            losses[name] = error.what
    return losses


def _losses_of_file(host: PluginHost, name: str) -> list[str]:
    """Load a plugin file, and list its losses."""
    from qpref.errors import RecipeError
    from qpref.hooks.manager import LOSS
    from qpref.hooks.plugin_files import load_plugin_file
    from qpref.opening import real_path

    file = load_plugin_file(real_path(Path(name)))
    host.add(file.plugins)
    losses = [plugin.record.name for plugin in file.plugins if plugin.offer.kind == LOSS.prefix]
    if not losses:
        raise RecipeError(f"{name}: offers no loss")
    return losses


def _check_contract(losses: Mapping[str, Loaded | str], all_installed: bool, as_json: bool) -> None:
    """Print each loss's results.

    Raises:
        PluginError: a loss breaks a rule, or can't be loaded.
    """
    from qpref.errors import PluginError
    from qpref.testing import check_loss

    broken: dict[str, str] = {}
    facts: list[dict[str, Any]] = []
    for name, loaded in losses.items():
        if isinstance(loaded, str):
            broken[name] = loaded
            facts.append({"loss": name, "from": None, "error": loaded, "results": []})
            if not as_json:
                echo(f"{name}: cannot be loaded")
            continue
        results = check_loss(loaded.record)
        rules = dict.fromkeys(result.rule for result in results if result.status == "broken")
        if rules:
            broken[name] = f"loss '{name}' ({loaded.offer}) breaks: {', '.join(rules)}"
        facts.append({"loss": name, "from": str(loaded.offer), "error": None, "results": list(map(_as_json, results))})
        if not as_json:
            _print_results(loaded.offer, results, in_full=not all_installed or bool(rules))
    if as_json:
        echo(json.dumps(facts, indent=2, default=str))
    if broken:
        head = [f"{len(broken)} of {len(losses)} losses cannot be relied on"] if len(losses) > 1 else []
        lines = [f"  {line}" if head else line for line in broken.values()]
        raise PluginError("\n".join(head + lines), _advice(losses, list(broken)))


def _as_json(result: Result) -> dict[str, Any]:
    from qpref.testing.advice import advice_on

    return asdict(result) | {"advice": advice_on(result)}


def _advice(losses: Mapping[str, Loaded | str], broken: Sequence[str]) -> str:
    """Say what to do about losses that break a rule."""
    own = [loaded.offer for name, loaded in losses.items() if name in broken and not isinstance(loaded, str)]
    if own and not any(offer.is_installed for offer in own):
        return "docs/losses/write-your-own.md has the rules"
    disabled = ",".join(f"loss-{name}" for name in broken)
    return f"report it to the plugin's author; QPREF_DISABLE={disabled} leaves it out"


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
    from qpref.hooks.types import ListLoss, UnpairedLoss

    if isinstance(record, ListLoss):
        return "list"
    return "unpaired" if isinstance(record, UnpairedLoss) else "paired"


def _by_options(tables: Sequence[tuple[Any, Any]], values: Sequence[str]) -> str:
    """Format the value under the default options, and those under other options where they differ."""
    others = [
        f"{value} with {options_text(table)}"
        for (table, _), value in zip(tables, values, strict=True)
        if value != values[0]
    ]
    return "; ".join([values[0], *others])


def _print_results(offer: Offer, results: Sequence[Result], in_full: bool) -> None:
    """Print one line for the loss and, in full, one for each rule and outcome, with the options that gave it."""
    from qpref.testing.advice import advice_on

    tables = {options_text(result.options) for result in results}
    is_broken = any(result.status == "broken" for result in results)
    count = f"{len(tables)} set{'s' if len(tables) > 1 else ''} of options"
    echo(f"{offer.name} ({offer}): {'broken' if is_broken else 'ok'}, {count}")
    if not in_full:
        return
    rows = []
    for rule in dict.fromkeys(result.rule for result in results):
        outcomes: dict[tuple[str, str], list[str]] = {}
        for result in results:
            if result.rule == rule:
                outcomes.setdefault((result.status, result.message), []).append(options_text(result.options))
        for (status, message), where in outcomes.items():
            options = "" if len(where) == len(tables) else f"with {'; '.join(where)}"
            word = {"passed": "ok", "broken": "BROKEN"}.get(status, status)
            rows.append((f"  {rule}", word, ": ".join(part for part in (options, message) if part)))
    print_table(rows)
    for rule, advice in {result.rule: advice_on(result) for result in results if result.status == "broken"}.items():
        echo(textwrap.fill(f"to fix {rule}: {advice}", 100, initial_indent="  ", subsequent_indent="    "))


def _type(annotation: Any) -> str:
    """Name a type in the words of a recipe: number, text, list of text."""
    import types
    from typing import Literal, Union, get_args, get_origin

    origin, arms = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return " or ".join(toml_text(arm) for arm in arms)
    if origin in (Union, types.UnionType):
        return " or ".join(_type(arm) for arm in arms if arm is not type(None))
    if origin is list:
        return f"list of {_type(arms[0])}"
    if hasattr(annotation, "__metadata__"):
        return _type(annotation.__origin__)
    return {str: "text", int: "whole number", float: "number", bool: "true or false"}.get(annotation, str(annotation))
