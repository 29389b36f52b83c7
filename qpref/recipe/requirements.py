"""Packages that a recipe's sinks need beyond those of qpref: refused before a run starts, not after an hour."""

from __future__ import annotations

from collections.abc import Sequence

from qpref.distributed.environment import is_first
from qpref.errors import InstallError
from qpref.installed import install_command, missing
from qpref.recipe.choices import Choice


def refuse_missing(sinks: Sequence[Choice]) -> None:
    """Stop where a sink's packages are not installed; only the process that opens the sinks needs them.

    Raises:
        InstallError: names all that are missing, and the command that installs them.
    """
    if not is_first():
        return
    needs = [(sink.plugin, missing(sink.plugin.record.requires)) for sink in sinks]
    lacking = [(plugin, needed) for plugin, needed in needs if needed]
    if lacking:
        lines = [f"sink '{plugin.record.name}' needs {' and '.join(needed)}" for plugin, needed in lacking]
        commands = [install_command(plugin.offer.distribution, needed) for plugin, needed in lacking]
        raise InstallError("\n  ".join(lines), "; ".join(dict.fromkeys(commands)))
