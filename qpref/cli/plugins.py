"""`qpref plugins`"""

from __future__ import annotations

import json

import click

from qpref.cli.options import json_option
from qpref.cli.output import echo
from qpref.cli.tables import print_table


@click.command("plugins")
@json_option
def command(as_json: bool) -> None:
    """List the installed plugins without importing them.

    Leave plugins out with QPREF_DISABLE=loss-kto,acme:loss-dpo.
    """
    from dataclasses import asdict

    from qpref.hooks.manager import KINDS, installed_offers

    offers = installed_offers()
    if as_json:
        echo(json.dumps([asdict(offer) for offer in offers], indent=2))
        return
    rows = [("KIND", "NAME", "DISTRIBUTION", "VERSION", "ENTRY POINT")]
    for offer in offers:
        kind = KINDS[offer.kind].noun if offer.kind in KINDS else f"unknown kind '{offer.kind}'"
        rows.append((kind, offer.name, offer.distribution, offer.version, offer.entry_point))
    print_table(rows)
