"""Plugins: names offered twice, unknown kinds, and modules that aren't there, without importing any plugin."""

from __future__ import annotations

import importlib.util
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path

from qpref.doctor.finding import Finding
from qpref.hooks.manager import KINDS, Offer, installed_offers

TOPIC = "plugins"


def examine_plugins() -> Iterator[Finding]:
    """Look at what the installed distributions offer."""
    yield from plugin_findings(installed_offers())


def plugin_findings(offers: Sequence[Offer]) -> Iterator[Finding]:
    """Judge entry points by their names and by whether their modules are installed."""
    distributions = sorted({f"{offer.distribution} {offer.version}" for offer in offers})
    yield Finding(TOPIC, "ok", f"{len(offers)} plugins of {', '.join(distributions) or 'no distribution'}")
    by_name: dict[str, list[Offer]] = defaultdict(list)
    for offer in offers:
        by_name[offer.entry_point].append(offer)
        if offer.kind not in KINDS:
            message = f"{offer}: unknown kind '{offer.kind}'; known: {', '.join(KINDS)}"
            yield Finding(TOPIC, "problem", message, "report it to the plugin's author")
        elif not _is_there(offer.module):
            message = f"{offer}: there is no module {offer.module}"
            fix = f"reinstall {offer.distribution}, or leave it out: QPREF_DISABLE={offer.entry_point}"
            yield Finding(TOPIC, "problem", message, fix)
    for same in by_name.values():
        if len(same) > 1:
            first = same[0]
            message = f"{' and '.join(map(str, same))} have one name"
            fix = f"uninstall one, or leave one out: QPREF_DISABLE={first.distribution}:{first.entry_point}"
            yield Finding(TOPIC, "problem", message, fix)


def _is_there(module: str) -> bool:
    """Look for a module's file; only its top package is found by Python, which imports nothing for that."""
    top, *inner = module.partition(":")[0].split(".")
    try:
        spec = importlib.util.find_spec(top)
    except (ImportError, ValueError):
        return False
    if spec is None:
        return False
    if not inner:
        return True
    path = "/".join(inner)
    places = [Path(folder) / path for folder in spec.submodule_search_locations or ()]
    return any(place.is_dir() or list(place.parent.glob(f"{place.name}.*")) for place in places)
