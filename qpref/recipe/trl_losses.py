"""Find the installed loss that equals one of TRL's, by the TRL configurations that losses declare."""

from __future__ import annotations

from qpref.aliases.loss_names import DEFAULT_LOSS_TYPES, TrlLoss
from qpref.errors import PluginError
from qpref.hooks.manager import LOSS, Loaded, PluginHost
from qpref.hooks.types import TrlCase


def find_loss(host: PluginHost, wanted: TrlLoss) -> Loaded | None:
    """Return the installed loss that equals TRL's; None where none does.

    Imports losses until one fits; broken ones are passed over.
    """
    for name in sorted(host.names(LOSS)):
        try:
            loaded = host.load(LOSS, name)
        except PluginError:
            continue
        if any(_names(case, wanted) for case in loaded.record.trl_cases if not case.reason):
            return loaded
    return None


def _names(case: TrlCase, wanted: TrlLoss) -> bool:
    loss_type = case.config.get("loss_type", DEFAULT_LOSS_TYPES[case.trainer])
    named = list(loss_type) if isinstance(loss_type, list | tuple) else [loss_type]
    return case.trainer == wanted.trainer and named == [wanted.loss_type]
