"""Rewrite the planned figures in the shipped recipes: comments of the form `--card NAME   MEMORY, LAYERS, WORK`.

Run `python docs/make_recipe_plans.py` after a change of the planner. Planned without the data: every pair has the
greatest lengths that the recipe allows.
"""

from __future__ import annotations

import re
import shlex
from pathlib import Path

from qpref.memory.cards import find_card
from qpref.memory.forecast import Forecast, Target
from qpref.memory.parts import GIB
from qpref.recipe.resolve import make_plan

RECIPES = Path(__file__).parents[1] / "recipes"
NO_DATA = ('data.train="nowhere.jsonl"',)
LINE = re.compile(r"^(#     (--card .*?)  +)[\d.]+ of.*$", re.MULTILINE)
"""A comment's line: the options of `qpref plan` in the second group, the figures after it."""


def page(recipe: Path) -> str:
    """Return a recipe's text with its planned figures renewed."""
    return LINE.sub(lambda found: found[1] + _figures(recipe, shlex.split(found[2])), recipe.read_text())


def _figures(recipe: Path, options: list[str]) -> str:
    target = Target.of_card(find_card(options[1]), "--desktop" in options)
    forecast = Forecast.of(make_plan(recipe, NO_DATA), target)
    facts, fit = forecast.facts(), forecast.fit
    if not fit.fits:
        return f"{fit.memory.total / GIB:.2f} of {target.limit_bytes / GIB:.2f} GiB: doesn't fit"
    layers = f"{fit.recomputed_layers} of {forecast.demand.shape.num_layers} layers"
    work = f"{facts['flops_per_step'] / 1e12:,.0f} TFLOP a step"
    return f"{fit.memory.total / GIB:.2f} of {target.limit_bytes / GIB:.2f} GiB, {layers}, {work}"


if __name__ == "__main__":
    for path in sorted(RECIPES.glob("*.toml")):
        path.write_text(page(path))
