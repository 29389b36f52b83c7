"""`qpref init`"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import click

from qpref.cli import completion
from qpref.cli.output import echo, refuse_existing

SCHEMA = "recipe.schema.json"
GOALS = ("align", "base", "noisy", "short")


@click.command("init")
@click.option("--model", "base", metavar="BASE", help="Base model: a hub id, a folder, or a .gguf file.")
@click.option(
    "--data",
    "train",
    metavar="DATA",
    shell_complete=completion.files,
    help="Training data: a file, a folder, or hf:org/name.",
)
@click.option("--heldout", metavar="DATA", help="Held-out data.  [default: a share of the training prompts]")
@click.option(
    "--card",
    metavar="NAME",
    shell_complete=completion.cards,
    help="Card to plan for, by its name: 'RTX 3060 12GB'.  [default: this machine]",
)
@click.option("--vram", metavar="SIZE", help="Plan for a GPU with this much free memory: 24GiB.")
@click.option(
    "--goal",
    type=click.Choice(GOALS),
    help="align: prefer the chosen answers. base: the model isn't instruction-"
    "tuned. noisy: labels are often wrong. short: answers shall not get longer.  [default: align]",
)
@click.option(
    "--output",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="RECIPE",
    help="Recipe to write.  [default: recipe.toml]",
)
@click.option("--overwrite", is_flag=True, help="Replace the recipe of that name.")
def command(output: Path | None, overwrite: bool, **wishes: Any) -> None:  # fmt: skip
    """Write a first recipe: looks at the data and the card, chooses values with reasons, and plans the run.

    Asks for what the options leave open, if this is a terminal. Loads no weights; fetches the data of a hub dataset and
    a model's config at most.
    """
    from qpref.cli import quiet_transformers
    from qpref.convert.sources import Folders, location
    from qpref.first_recipe.propose import Wishes, propose
    from qpref.first_recipe.sample import look_at
    from qpref.first_recipe.write import recipe_text
    from qpref.fsio import write_text
    from qpref.recipe.resolve import make_data_plan

    if wishes["card"] is not None and wishes["vram"] is not None:
        raise click.UsageError("--card and --vram exclude each other: both name the memory.")
    quiet_transformers()
    output, overwrite = _answered(wishes, output, overwrite)
    refuse_existing(output, overwrite)
    folders = Folders((Path.cwd(),), Path.cwd())
    named = {
        key: wishes[key] if ":" in wishes[key] or Path(wishes[key]).is_absolute() else location(wishes[key], folders)
        for key in ("train", "heldout")
        if wishes[key]
    }
    sample = look_at(make_data_plan(named["train"]).sources[0])
    echo(f"data: {sample.summary()}", err=True)
    proposal = propose(Wishes(**(wishes | named)), sample)
    _move(proposal.tables, output.parent)
    goal = "" if wishes["goal"] == "align" else f", goal {wishes['goal']}"
    title = f"Made by `qpref init` for {wishes['base']} and {wishes['train']}{goal}."
    schema = SCHEMA if (output.parent / SCHEMA).is_file() else None
    write_text(output, recipe_text(proposal, title, str(output), schema))
    for sentence in proposal.plan:
        echo(f"plan: {sentence}", err=True)
    echo(f"recipe: {output}\nnext: qpref check {output}, then qpref train {output}")


def _answered(wishes: dict[str, Any], output: Path | None, overwrite: bool) -> tuple[Path, bool]:
    """Ask for what is missing, if somebody can answer; else name it."""
    from qpref.errors import RecipeError
    from qpref.first_recipe.goals import GOALS as FOR

    if not can_ask():
        missing = [flag for flag, key in (("--model", "base"), ("--data", "train")) if not wishes[key]]
        if missing:
            raise RecipeError(f"{' and '.join(missing)}: missing, and there is no terminal to ask in")
        wishes["goal"] = wishes["goal"] or "align"
        return output or Path("recipe.toml"), overwrite
    wishes["train"] = wishes["train"] or click.prompt("Training data (a file, or hf:org/name)")
    wishes["base"] = wishes["base"] or click.prompt("Base model (a hub id, or a folder)")
    if wishes["card"] is None and wishes["vram"] is None:
        wishes["card"] = click.prompt("Card (Enter for this machine's)", default="", show_default=False) or None
    if wishes["goal"] is None:
        for name, goal in FOR.items():
            echo(f"  {name:<6} {goal.summary}")
        wishes["goal"] = click.prompt("Goal", type=click.Choice(GOALS), default="align")
    output = output or Path(click.prompt("Recipe", default="recipe.toml"))
    if output.exists() and not overwrite:
        overwrite = click.confirm(f"{output} exists; replace it?")
    return output, overwrite


def can_ask() -> bool:
    """Return whether questions reach somebody who can answer."""
    return sys.stdin.isatty() and sys.stdout.isatty()


def _move(tables: dict[str, dict[str, Any]], folder: Path) -> None:
    """Make paths that are relative to the current folder relative to the recipe's."""
    for table, keys in (("data", ("train", "heldout")), ("model", ("base",))):
        for key in keys:
            path = tables[table].get(key)
            if isinstance(path, str) and not Path(path).is_absolute() and Path(path).exists():
                tables[table][key] = os.path.relpath(path, folder)
