"""Look up a key of another tool in the table of aliases."""

from __future__ import annotations

from functools import cache

from qpref.aliases.alias import Alias, Tool
from qpref.aliases.data_keys import DATA, LOSS
from qpref.aliases.model_keys import ADAPTER, MODEL
from qpref.aliases.training_keys import EVALUATION, OPTIMIZER

GROUPS = {
    "Model": MODEL,
    "Adapter": ADAPTER,
    "Data": DATA,
    "Loss and reference": LOSS,
    "Optimizer and steps": OPTIMIZER,
    "Evaluation, checkpoints, logging": EVALUATION,
}
ALIASES = tuple(alias for group in GROUPS.values() for alias in group)


def find(key: str) -> Alias | None:
    """Find a key of any tool, without its table; None where no tool is known to have it."""
    return _by_name().get(key)


@cache
def by_key(tool: Tool) -> dict[str, Alias]:
    """Map each key of the tool's files to its alias."""
    return {key: alias for alias in ALIASES for key in alias.keys(tool)}


@cache
def _by_name() -> dict[str, Alias]:
    # Keys of one name have one alias in all tools, or equal explanations; tests check that.
    return {name.rpartition(".")[2]: alias for alias in reversed(ALIASES) for name in alias.names}
