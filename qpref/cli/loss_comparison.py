"""`qpref losses check --against trl`"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from qpref.cli.output import echo
from qpref.cli.tables import options_text, print_table

if TYPE_CHECKING:
    from qpref.hooks.manager import Loaded, Offer
    from qpref.hooks.types import TrlCase
    from qpref.testing.against_trl import Comparison


def compare_losses(losses: Mapping[str, Loaded | str], all_installed: bool, as_json: bool) -> None:
    """Print how far each loss is from the TRL that is installed.

    Args:
        losses: name -> the loaded loss, or the error that loading it raised.
        all_installed: leave out losses that TRL doesn't have.
        as_json: print one JSON object instead of text.

    Raises:
        RecipeError: TRL isn't installed.
        PluginError: a loss differs where no difference is intended, or can't be loaded or called.
    """
    from qpref.errors import PluginError
    from qpref.testing import BrokenRule
    from qpref.testing.against_trl import NUM_BATCHES, compare_with_trl
    from qpref.testing.trl_trainers import trl_version

    version = trl_version()
    failures: dict[str, str] = {}
    facts: list[dict[str, Any]] = []
    if not as_json:
        echo(f"TRL {version}: largest relative differences over {NUM_BATCHES} random batches")
    hint: str | None = None
    for name, loaded in losses.items():
        try:
            comparisons = [] if isinstance(loaded, str) else compare_with_trl(loaded.record)
        except BrokenRule as error:
            loaded, comparisons = f"loss '{name}': {error}", []
        if isinstance(loaded, str):
            failures[name] = loaded
            facts.append({"loss": name, "from": None, "outcome": "error", "message": loaded, "cases": []})
            continue
        outcome = _outcome(comparisons)
        if outcome == "differs":
            failures[name] = f"loss '{name}' ({loaded.offer}) differs from TRL {version}, and nothing says why"
            hint = "an intended difference gets a reason in the record's trl_cases"
        if all_installed and outcome == "not in TRL":
            continue
        facts.append({"loss": name, "from": str(loaded.offer), "outcome": outcome, "cases": _facts(comparisons)})
        if not as_json:
            _print(loaded.offer, outcome, comparisons)
    if as_json:
        echo(json.dumps({"trl": version, "batches": NUM_BATCHES, "losses": facts}, indent=2))
    if failures:
        raise PluginError("\n".join(failures.values()), hint)


def _outcome(comparisons: Sequence[Comparison]) -> str:
    """Return the loss's outcome: that of its most important case."""
    statuses = {comparison.status for comparison in comparisons}
    for status in ("differs", "agrees", "differs as intended"):
        if status in statuses:
            return status
    return "not in TRL"


def _facts(comparisons: Sequence[Comparison]) -> list[dict[str, Any]]:
    return [
        {
            "outcome": comparison.status,
            "loss_difference": comparison.difference and comparison.difference.loss,
            "gradient_difference": comparison.difference and comparison.difference.gradient,
            "options": dict(comparison.case.options),
            "trainer": comparison.case.trainer,
            "config": dict(comparison.case.config),
            "dtype": comparison.case.dtype,
            "batch": comparison.case.num_examples,
            "micro_batch": comparison.case.micro_batch or comparison.case.num_examples,
            "message": comparison.message,
        }
        for comparison in comparisons
    ]


def _print(offer: Offer, outcome: str, comparisons: Sequence[Comparison]) -> None:
    if outcome == "not in TRL":
        lacks = {comparison.message for comparison in comparisons}
        echo(f"\n{offer.name} ({offer}): TRL has no such loss{''.join(f' ({text})' for text in sorted(lacks))}")
        if not comparisons:
            echo("  nothing was compared; a loss that is TRL's under another name says so in its record's trl_cases")
        return
    echo(f"\n{offer.name} ({offer}): {'DIFFERS' if outcome == 'differs' else outcome}")
    rows = [("  ", "loss", "gradient", "qpref", "TRL")]
    notes: list[str] = []
    for comparison in comparisons:
        mark = ""
        if comparison.message:
            notes.append(comparison.message)
            mark = f" [{len(notes)}]"
        status = "DIFFERS" if comparison.status == "differs" else comparison.status
        difference = comparison.difference
        numbers = ("", "") if difference is None else (f"{difference.loss:.1e}", f"{difference.gradient:.1e}")
        options = options_text(comparison.case.options)
        rows.append((f"  {status}{mark}", *numbers, options, _trl_text(comparison.case)))
    print_table(rows)
    for number, note in enumerate(notes, 1):
        echo(f"  [{number}] {note}")


def _trl_text(case: TrlCase) -> str:
    """TRL's trainer and options, and what is special about the case's batches."""
    batch = "batch 1" if case.num_examples == 1 else ""
    if case.micro_batch is not None:
        batch = f"micro-batches of {case.micro_batch}"
    notes = [note for note in (batch, case.dtype if case.dtype != "float64" else "") if note]
    return f"{case.trainer}: {options_text(case.config)}" + (f" ({', '.join(notes)})" if notes else "")
