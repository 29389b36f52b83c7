"""qpref: preference training of 4-bit language models on one consumer GPU.

import qpref
run_folder = qpref.train("recipes/quickstart.toml", overrides=["train.epochs=2"])
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qpref.hooks.types import Loss, MetricSink, Reader, Validator

    Plugin = Loss | MetricSink | Reader | Validator

__version__ = "0.1.0"
__all__ = ["train"]


def train(
    recipe: str | PathLike[str] | Mapping[str, Any],
    *,
    overrides: Sequence[str] = (),
    output: str | PathLike[str] | None = None,
    resume: bool = False,
    overwrite: bool = False,
    plugins: Sequence[Plugin] = (),
) -> Path:
    """Train by a recipe; the same as the command `qpref train`.

    Args:
        recipe: a TOML file, or its content as nested dicts (relative paths in it start at the current folder).
        overrides: `table.key=value` each, as with `--set`.
        output: the run folder; by default `runs/<the recipe's file name without .toml>`.
        resume: continue from the run folder's newest checkpoint.
        overwrite: remove a run that is in the folder.
        plugins: records of losses, checks, readers and sinks of this program, which the recipe can name beside the
            installed ones. They have no version: a resumed run takes them as they are.

    Returns:
        The run folder; the trained adapter is in its `adapter/`.

    Raises:
        QprefError: see `qpref.errors`; the message says what to do.
    """
    from qpref.linux import require_linux

    require_linux()
    from qpref.recipe.resolve import make_plan
    from qpref.training.run import train_plan

    source = recipe if isinstance(recipe, Mapping) else Path(recipe)
    plan = make_plan(source, overrides, Path(output) if output is not None else None, plugins)
    return train_plan(plan, resume=resume, overwrite=overwrite)
