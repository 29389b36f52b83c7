"""`qpref plan`"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from qpref.cli import completion, plan_gpus, plan_text
from qpref.cli.options import json_option, set_option
from qpref.cli.output import echo

if TYPE_CHECKING:
    from qpref.memory.forecast import Forecast, Target
    from qpref.recipe.sections import Recipe


@click.command("plan")
@click.argument("recipe", type=click.Path(path_type=Path), required=False)
@click.option("--vram", metavar="SIZE", help="Plan for a GPU with this much free memory: 24GiB, 24GB, 24.")
@click.option(
    "--card",
    metavar="NAME",
    shell_complete=completion.cards,
    help="Plan for a card by its name: 'RTX 3060 12GB', A10G; see --desktop.",
)
@click.option("--desktop", is_flag=True, help="Leave 1 GiB of the card to a desktop.")
@click.option(
    "--shape",
    metavar="NAME|FOLDER",
    shell_complete=completion.shapes,
    help="Size of the base: a known shape, or a folder with config.json.",
)
@set_option
@click.option("--tflops", type=click.FloatRange(min=0, min_open=True), help="Speed in TFLOP/s to predict hours at.")
@click.option("--gpus", type=click.IntRange(min=1), metavar="N", help="Plan for N such GPUs, in each of --hosts.")
@click.option("--hosts", type=click.IntRange(min=1), metavar="N", help="Plan for N hosts, each with --gpus GPUs.")
@click.option("--link", "links", multiple=True, metavar="NAME", help="Link of a host's GPUs (pcie4, nvlink, ...), and "
              "of hosts (ethernet-10g, infiniband-400g, ...); repeatable.")  # fmt: skip
@json_option
def command(
    recipe: Path | None,
    *,
    shape: str | None,
    overrides: tuple[str, ...],
    tflops: float | None,
    as_json: bool,
    **more: Any,
) -> None:
    """Predict the memory, work and steps of RECIPE, a TOML file, or of --shape alone.

    Loads no weights and needs no GPU. Exits with 5 if nothing fits the memory.
    """
    from qpref.cli import quiet_transformers

    quiet_transformers()
    several = {name: more.pop(name) for name in ("gpus", "hosts", "links")}
    forecast = _forecast(recipe, shape, overrides, more)
    facts = {"recipe": recipe and str(recipe)} | forecast.facts(tflops)
    if (several["gpus"] or 1) * (several["hosts"] or 1) > 1:
        plan_gpus.show(forecast, facts, tflops, as_json, **several)
        return
    if several["links"]:
        raise click.UsageError("--link is between several GPUs: add --gpus or --hosts.")
    if as_json:
        from qpref.memory.forecast import Prediction

        echo(json.dumps(Prediction.of(facts).as_json(), indent=2))
    else:
        for line in plan_text.lines(forecast, facts):
            echo(line)
    if not forecast.fit.fits:
        raise plan_text.too_small(forecast.fit, forecast.target)


def _forecast(recipe: Path | None, shape: str | None, overrides: Sequence[str], device: dict[str, Any]) -> Forecast:
    """Forecast a recipe, or preference training of a shape with the settings of NO_RECIPE."""
    from qpref.first_recipe.goals import loss_table
    from qpref.memory.forecast import Forecast
    from qpref.memory.planned_data import longest_allowed
    from qpref.recipe.resolve import make_plan

    if recipe is not None:
        plan = make_plan(recipe, overrides)
        return Forecast.of(plan, _target(plan.recipe, **device), shape)
    if shape is None:
        raise click.UsageError("Name a RECIPE, or a base by --shape.")
    loss, _ = loss_table("align", is_paired=True)
    plan = make_plan({"model": {"base": shape}, "loss": {"name": loss["name"]}, **NO_RECIPE}, overrides)
    train, rank = plan.recipe.train, plan.recipe.adapter.rank
    settings = f"no recipe: {plan.losses[0].plugin.record.name} at rank {rank} with {train.optimizer}"
    return Forecast.of(plan, _target(plan.recipe, **device), shape, longest_allowed(plan, settings))


NO_RECIPE: dict[str, Any] = {
    "adapter": {"rank": 8},
    "data": {"train": "pairs.jsonl", "max_length": 512, "max_prompt_length": 256},
    "train": {"optimizer": "adamw_8bit"},
}
"""Settings of a plan by a shape alone: small ones, since what is asked is whether the base can be trained at all."""


def _target(recipe: Recipe, vram: str | None, card: str | None, desktop: bool) -> Target:
    """Choose what to plan for: a card, a size of memory, or this machine."""
    from qpref.memory.forecast import Target

    if vram is not None and card is not None:
        raise click.UsageError("--card and --vram exclude each other: both name the memory.")
    if desktop and card is None:
        raise click.UsageError("--desktop needs --card; --vram is free memory, without a desktop's share.")
    return Target.chosen(recipe, vram=vram, card=card, desktop=desktop)
