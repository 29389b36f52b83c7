"""`qpref plugins check`"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from qpref.cli import completion
from qpref.cli.options import json_option
from qpref.cli.output import echo
from qpref.cli.tables import print_table

if TYPE_CHECKING:
    from qpref.hooks.manager import Loaded, PluginHost
    from qpref.testing import Result


@click.command("check")
@click.argument("names", metavar="NAME...", nargs=-1, required=True, shell_complete=completion.plugins)
@click.option(
    "--sample",
    metavar="DATA",
    help="Data that a reader reads: a file, a folder, or a name. Without it, rules that need rows are skipped.",
)
@click.option("--set", "settings", metavar="KEY=VALUE", multiple=True, help="Option of the plugin, as in a recipe.")
@json_option
def command(names: tuple[str, ...], sample: str | None, settings: tuple[str, ...], as_json: bool) -> None:
    """Check plugins of any kind against their contract.

    NAME is a plugin's name, its entry point where several kinds have the name (`sink-warm`), or a file that ends in
    .py.

    A validator sees examples in several languages and must find the same twice; a reader reads a sample, whole and
    damaged; a sink is opened for a short run in a temporary folder, and sends it where it sends a run. A loss is
    checked as by `qpref losses check`.

    Exits with 6 if a plugin breaks a rule.
    """
    import torch

    from qpref.errors import PluginError, RecipeError
    from qpref.hooks.manager import PluginHost
    from qpref.recipe.document import with_overrides

    torch.set_num_threads(1)
    options: dict[str, Any] = with_overrides({}, [f"options.{setting}" for setting in settings]).get("options", {})
    host = PluginHost()
    plugins = [plugin for name in names for plugin in _plugins(host, name)]
    if (sample is not None or options) and len(plugins) > 1:
        found = ", ".join(plugin.record.name for plugin in plugins)
        raise RecipeError(f"--sample and --set are for one plugin, not for {found}", "name one; a file has to have one")
    facts, broken = [], []
    for plugin in plugins:
        results = _results(plugin, options, sample)
        rules = dict.fromkeys(result.rule for result in results if result.status == "broken")
        if rules:
            broken.append(f"{plugin.offer} breaks: {', '.join(rules)}")
        facts.append(
            {"plugin": plugin.offer.entry_point, "from": str(plugin.offer), "results": list(map(asdict, results))}
        )
        if not as_json:
            _print(plugin, results)
    if as_json:
        echo(json.dumps(facts, indent=2, default=str))
    if broken:
        raise PluginError("\n  ".join(broken), "docs/plugins.md has the rules of each kind")


def _plugins(host: PluginHost, name: str) -> Sequence[Loaded]:
    """Load the plugin of a name or of an entry point, or those of a file.

    Raises:
        RecipeError: there is none, or several kinds have it.
        PluginError: it can't be loaded.
    """
    import difflib

    from qpref.errors import RecipeError
    from qpref.hooks.manager import KINDS
    from qpref.hooks.plugin_files import load_plugin_file
    from qpref.opening import real_path

    if name.endswith(".py"):
        return load_plugin_file(real_path(Path(name))).plugins
    offers = {(offer.kind, offer.name) for offer in host.offers if offer.kind in KINDS}
    exact = [one for one in offers if name == "-".join(one)]
    found = sorted(exact or [one for one in offers if one[1] == name])
    if len(found) > 1:
        points = ", ".join("-".join(one) for one in found)
        raise RecipeError(f"several plugins have the name '{name}'", f"name one of the entry points: {points}")
    if not found:
        words = sorted({word for one in offers for word in (one[1], "-".join(one))})
        near = difflib.get_close_matches(name, words, n=1)
        guess = f"; did you mean '{near[0]}'?" if near else ""
        raise RecipeError(f"no plugin '{name}' is installed{guess}", "qpref plugins lists those that are")
    ((kind, plugin),) = found
    return [host.load(KINDS[kind], plugin)]


def _results(plugin: Loaded, options: Mapping[str, object], sample: str | None) -> list[Result]:
    from qpref.errors import RecipeError
    from qpref.hooks.reader import Reader
    from qpref.hooks.types import Loss
    from qpref.testing import check_loss, check_plugin

    if sample is not None and not isinstance(plugin.record, Reader):
        raise RecipeError(f"--sample is for a reader, and {plugin.offer} is none")
    if not isinstance(plugin.record, Loss):
        return check_plugin(plugin.record, options=options, sample=sample)
    if options:
        raise RecipeError("a loss is checked with its default options and its variants, not with --set")
    return check_loss(plugin.record)


def _print(plugin: Loaded, results: Sequence[Result]) -> None:
    is_broken = any(result.status == "broken" for result in results)
    echo(f"{plugin.record.name} ({plugin.offer}): {'broken' if is_broken else 'ok'}")
    words = {"passed": "ok", "broken": "BROKEN", "skipped": "skipped"}
    rows = dict.fromkeys((f"  {result.rule}", words[result.status], result.message) for result in results)
    print_table(list(rows))
