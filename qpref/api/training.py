"""`qpref.train`: a run by a recipe, from Python"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING

from qpref.api.calls import call
from qpref.api.recipes import Overrides, RecipeLike, listed, source_of
from qpref.api.rows import Rows, rows_folder, source_override, store_rows
from qpref.api.run import Run

if TYPE_CHECKING:
    from qpref.hooks.reader import Reader
    from qpref.hooks.types import Loss, MetricSink, Validator
    from qpref.records import MetricRow

    Plugin = Loss | MetricSink | Reader | Validator


def train(
    recipe: RecipeLike,
    *,
    overrides: Overrides = (),
    output: str | PathLike[str] | None = None,
    resume: bool = False,
    overwrite: bool = False,
    rows: Rows | None = None,
    heldout: Rows | None = None,
    plugins: Sequence[Plugin] = (),
    on_metrics: Callable[[MetricRow], object] | None = None,
    progress: bool = False,
) -> Run:
    """Train by a recipe; the same as the command `qpref train`.

    Args:
        recipe: a TOML file, the text of one, its content as nested dicts, or a `Recipe`. Relative paths in it start at
            the file's folder, or else at the current one.
        overrides: `{"table.key": value}`, or strings `table.key=value` as with `--set`.
        output: the run folder; by default `runs/<the recipe's file name without .toml>`.
        resume: continue from the run folder's newest checkpoint.
        overwrite: remove a run that is in the folder.
        rows: training data, each row like one of a JSON Lines file, in place of `[data] train`. They are written to
            `<output>.rows/`, which the run's recipe names, so that the run can be resumed and evaluated later.
        heldout: held-out data, likewise.
        plugins: records of losses, checks, readers and sinks of this program, which the recipe can name beside the
            installed ones. They have no version: a resumed run takes them as they are.
        on_metrics: called with each row of metrics, in this thread, once it is in metrics.jsonl; training waits for it.
            If it raises, that is logged as a warning and it isn't called again. What it changes for the whole process
            (grad mode, random numbers, threads) is set back, so the run is the same with and without it.
        progress: let the recipe's sinks print; they print nothing otherwise.

    Returns:
        The run; the trained adapter is in its `adapter`.

    Raises:
        QprefError: see `qpref.errors`; the message says what to do.
    """
    with call():
        from qpref.recipe.resolve import make_plan, run_folder_of
        from qpref.training.run import train_plan

        source = source_of(recipe)
        folder = run_folder_of(source, None if output is None else Path(output))
        given = {split: one for split, one in (("train", rows), ("heldout", heldout)) if one is not None}
        stored = {split: store_rows(one, rows_folder(folder), split) for split, one in given.items()}
        changes = [*listed(overrides), *(source_override(split, path) for split, path in stored.items())]
        plan = make_plan(source, changes, folder, plugins)
        plan = replace(plan, printing="text" if progress else "nothing", on_metrics=on_metrics)
        return Run(train_plan(plan, resume=resume, overwrite=overwrite))
