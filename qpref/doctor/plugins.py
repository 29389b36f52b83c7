"""Plugins: names offered twice, unknown kinds, and modules that aren't there, without importing any plugin."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from qpref.doctor.finding import Finding
from qpref.hooks.manager import Offer, installed_offers
from qpref.hooks.offer_problems import problems_of_offers

TOPIC = "plugins"


def examine_plugins() -> Iterator[Finding]:
    """Look at what the installed distributions offer."""
    yield from plugin_findings(installed_offers())


def plugin_findings(offers: Sequence[Offer]) -> Iterator[Finding]:
    """Judge entry points by their names and by whether their modules are installed."""
    distributions = sorted({f"{offer.distribution} {offer.version}" for offer in offers})
    yield Finding(TOPIC, "ok", f"{len(offers)} plugins of {', '.join(distributions) or 'no distribution'}")
    for problem in problems_of_offers(offers):
        first, *others = map(str, problem.offers)
        message = f"{' and '.join([first, *others])} {problem.message}" if others else f"{first}: {problem.message}"
        yield Finding(TOPIC, "problem", message, problem.fix)
