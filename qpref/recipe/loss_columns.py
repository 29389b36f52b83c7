"""Columns of the rows that a recipe's losses read."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from qpref.errors import PluginError
from qpref.hooks import border
from qpref.recipe.choices import Choice


def joint_columns(losses: Iterable[Choice]) -> tuple[str, ...]:
    """Join the columns of the rows that the losses read, each once.

    Raises:
        PluginError: a loss's record doesn't name them.
    """
    return tuple(dict.fromkeys(name for loss in losses for name in _columns_of(loss)))


def _columns_of(loss: Choice) -> Sequence[str]:
    record = loss.plugin.record

    def broken(what: str) -> PluginError:
        return PluginError(f"loss '{record.name}' ({loss.plugin.offer}): {what}", "report it to the plugin's author")

    with border.guarded(
        f"columns of loss '{record.name}' ({loss.plugin.offer})",
        lambda error: broken(f"its columns raised {error}"),
        lambda change: broken(f"its columns {change}"),
    ):
        columns = record.columns_of(loss.options)
    if isinstance(columns, str) or not all(isinstance(name, str) and name for name in columns):
        raise broken(f"its columns are {columns!r}, not a tuple of names")
    return tuple(columns)
