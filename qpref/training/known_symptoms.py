"""Symptoms that a run shows before its first step, by its recipe and its data alone."""

from __future__ import annotations

from typing import Any

from qpref.data.order import total_steps
from qpref.training.adapter_change import idle_rate_warning
from qpref.training.objective import Objective
from qpref.training.prepare import Prepared


def known_symptoms(prepared: Prepared) -> list[dict[str, Any]]:
    """List the symptoms that need no step to be seen, in the form of `Watch.found`."""
    recipe = prepared.plan.recipe
    num_margins = sum(example.margin != 0 for example in prepared.examples)
    warnings = {
        "idle_rate": idle_rate_warning(recipe, total_steps(recipe.train, len(prepared.examples))),
        "unused_margins": _unused_margins(prepared.objective, num_margins),
    }
    return [{"rule": rule, "step": 0, "message": message} for rule, message in warnings.items() if message is not None]


def _unused_margins(objective: Objective, num_margins: int) -> str | None:
    """Warn of margins that no loss of the run looks at.

    Args:
        num_margins: training pairs with a margin of their own.
    """
    if not num_margins or not objective.ignores_margins:
        return None
    names = " and ".join(f"'{choice.plugin.record.name}'" for choice in objective.choices)
    pairs = "1 pair has a margin" if num_margins == 1 else f"{num_margins:,} pairs have a margin"
    return (
        f"{pairs}, and loss {names} has no use for them: they change nothing; leave the margins out, or take a loss "
        "that uses them (docs/losses/README.md)"
    )
