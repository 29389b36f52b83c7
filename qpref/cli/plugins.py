"""`qpref plugins`"""

from __future__ import annotations

import json

import click

from qpref.cli import plugin_check
from qpref.cli.groups import SuggestingGroup
from qpref.cli.options import json_option
from qpref.cli.output import echo
from qpref.cli.tables import print_table


@click.group("plugins", cls=SuggestingGroup, invoke_without_command=True)
@json_option
@click.pass_context
def command(ctx: click.Context, as_json: bool) -> None:
    """List the installed plugins without importing them, or check some.

    A plugin that can't be used has its problem beside it: a name that two distributions offer, an unknown kind, a
    missing module, a distribution made for another qpref.

    Leave plugins out with QPREF_DISABLE=loss-kto,acme:loss-dpo.
    """
    if ctx.invoked_subcommand is not None:
        return
    from dataclasses import asdict

    from qpref.hooks.manager import KINDS, installed_offers
    from qpref.hooks.offer_problems import problems_by_offer

    offers = installed_offers()
    problems = problems_by_offer(offers)
    if as_json:
        echo(json.dumps([asdict(offer) | {"problem": problems.get(offer)} for offer in offers], indent=2))
        return
    rows = [["KIND", "NAME", "DISTRIBUTION", "VERSION", "ENTRY POINT"] + ["PROBLEM"] * bool(problems)]
    for offer in offers:
        kind = KINDS[offer.kind].noun if offer.kind in KINDS else "?"
        row = [kind, offer.name, offer.distribution, offer.version, offer.entry_point]
        rows.append(row + [problems.get(offer, "")] * bool(problems))
    print_table(rows)


command.add_command(plugin_check.command)
