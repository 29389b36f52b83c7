"""Problems of installed plugins that show without importing one: clashes, kinds, modules, requirements."""

from __future__ import annotations

import importlib.util
from collections import defaultdict
from collections.abc import Container, Sequence
from dataclasses import dataclass
from pathlib import Path

from qpref.hooks import mistakes
from qpref.hooks.manager import Offer, kind_problem, way_out_of_clash
from qpref.hooks.mistakes import Mistake


@dataclass(frozen=True, slots=True)
class OfferProblem:
    """A problem of one plugin, or of several that clash.

    Attributes:
        message: the problem alone, without the plugins' names.
    """

    offers: tuple[Offer, ...]
    message: str
    fix: str


def problems_of_offers(offers: Sequence[Offer]) -> list[OfferProblem]:
    """Judge entry points by their names, by their distributions' metadata and by the modules that are there."""
    # Each distribution's metadata is a file to parse, and each package a search of the path.
    unmet = {name: mistakes.in_requirement(name) for name in {offer.distribution for offer in offers} - {mistakes.CORE}}
    lacking = {module for module in {offer.module for offer in offers} if not _is_there(module)}
    found = [problem for offer in offers if (problem := _problem(offer, unmet.get(offer.distribution), lacking))]
    by_name: dict[str, list[Offer]] = defaultdict(list)
    for offer in offers:
        by_name[offer.entry_point].append(offer)
    clashes = [tuple(same) for same in by_name.values() if len(same) > 1]
    return found + [OfferProblem(same, "have one name", way_out_of_clash(same)) for same in clashes]


def problems_by_offer(offers: Sequence[Offer]) -> dict[Offer, str]:
    """Return each offer's problem and its fix in one line, for those that have one."""
    found: dict[Offer, str] = {}
    for problem in problems_of_offers(offers):
        for offer in problem.offers:
            others = [str(other) for other in problem.offers if other != offer]
            message = f"clashes with {' and '.join(others)}" if others else problem.message
            if offer not in found:
                found[offer] = f"{message}; {problem.fix}"
    return found


def _problem(offer: Offer, unmet: Mistake | None, lacking: Container[str]) -> OfferProblem | None:
    if message := kind_problem(offer):
        return OfferProblem((offer,), message, "report it to the plugin's author")
    mistake = mistakes.in_entry_point(offer.module, offer.entry_point) or unmet
    if mistake is None and offer.module in lacking:
        mistake = Mistake(f"there is no module {offer.module}", f"reinstall {offer.distribution}")
    if mistake is None:
        return None
    return OfferProblem((offer,), mistake.what, f"{mistake.fix}, or leave it out: QPREF_DISABLE={offer.entry_point}")


def _is_there(module: str) -> bool:
    """Look for a module's file; only its top package is found by Python, which imports nothing for that."""
    top, *inner = module.split(".")
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
