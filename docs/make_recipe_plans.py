"""Rewrite the planned figures in the shipped recipes: comments of the form `--card NAME   MEMORY, LAYERS, WORK`.

Run `python docs/make_recipe_plans.py` after a change of the planner. Planned without the data: every pair has the
greatest lengths that the recipe allows. A line with `--gpus` has the bytes over the link and the seconds of a step.
"""

from __future__ import annotations

import argparse
import re
import shlex
from pathlib import Path

from qpref.memory.cards import find_card
from qpref.memory.fit import Fit
from qpref.memory.forecast import Forecast, Target
from qpref.memory.parts import GIB
from qpref.memory.scaling import plan_gpus
from qpref.recipe.resolve import make_plan

RECIPES = Path(__file__).parents[1] / "recipes"
NO_DATA = ('data.train="nowhere.jsonl"',)
LINE = re.compile(r"^(#     (--(?:card|gpus) .*?)  +)\d.*$", re.MULTILINE)
"""A comment's line: the options of `qpref plan` in the second group, the figures after it."""


def page(recipe: Path) -> str:
    """Return a recipe's text with its planned figures renewed."""
    return LINE.sub(lambda found: found[1] + _figures(recipe, _options(found[2])), recipe.read_text())


def _options(text: str) -> argparse.Namespace:
    """Parse options as `qpref plan` does."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--card", required=True)
    parser.add_argument("--desktop", action="store_true")
    parser.add_argument("--gpus", type=int, default=1)
    parser.add_argument("--link", action="append", default=[])
    return parser.parse_args(shlex.split(text))


def _figures(recipe: Path, options: argparse.Namespace) -> str:
    target = Target.of_card(find_card(options.card), options.desktop)
    forecast = Forecast.of(make_plan(recipe, NO_DATA), target)
    if options.gpus > 1:
        return _figures_of_several(forecast, options)
    facts, fit = forecast.facts(), forecast.fit
    if not fit.fits:
        return f"{_memory(fit, target)}: doesn't fit"
    work = f"{facts['flops_per_step'] / 1e12:,.0f} TFLOP a step"
    return f"{_memory(fit, target)}, {_layers(fit, forecast)}, {work}"


def _figures_of_several(forecast: Forecast, options: argparse.Namespace) -> str:
    scaling = plan_gpus(forecast, options.gpus, links=options.link)
    best = scaling.best
    if best is None:
        return f"{_memory(scaling.sharded.fit, forecast.target)}: doesn't fit"
    sent = (best.gradient_bytes + best.base_bytes) / GIB
    step = f"{sent:.0f} GiB sent and {best.step_seconds:.0f} s a step"
    return f"{_memory(best.fit, forecast.target)}, {_layers(best.fit, forecast)}, {step}"


def _memory(fit: Fit, target: Target) -> str:
    return f"{fit.memory.total / GIB:.2f} of {target.limit_bytes / GIB:.2f} GiB"


def _layers(fit: Fit, forecast: Forecast) -> str:
    return f"{fit.recomputed_layers} of {forecast.demand.shape.num_layers} layers"


if __name__ == "__main__":
    for path in sorted(RECIPES.glob("*.toml")):
        path.write_text(page(path))
