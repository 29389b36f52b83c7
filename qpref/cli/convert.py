"""`qpref convert`"""

from __future__ import annotations

from pathlib import Path

import click

from qpref.cli.output import echo, refuse_existing


@click.command("convert")
@click.argument("file", type=click.Path(path_type=Path))
@click.option(
    "--output",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="RECIPE",
    help="Recipe to write.  [default: print it]",
)
@click.option(
    "--from",
    "tool",
    type=click.Choice(["trl", "axolotl", "llamafactory"]),
    help="Tool that FILE is for.  [default: by its keys]",
)
@click.option(
    "--trainer", type=click.Choice(["dpo", "kto", "orpo", "cpo"]), help="TRL's trainer, which its files don't name."
)
@click.option(
    "--gpus",
    "num_gpus",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="GPUs that FILE was run on, a factor of the batch size.",
)
@click.option("--overwrite", is_flag=True, help="Replace the recipe of that name.")
def command(
    file: Path, *, output: Path | None, tool: str | None, trainer: str | None, num_gpus: int, overwrite: bool
) -> None:  # fmt: skip
    """Convert FILE, a YAML file of TRL, Axolotl or LLaMA-Factory, to a recipe.

    Says what isn't quite the same here, and what has no equal and why. No code is run, nothing is fetched.
    """
    from qpref.cli import quiet_transformers
    from qpref.convert.conversion import convert
    from qpref.convert.write import recipe_text, remarks
    from qpref.errors import RecipeError
    from qpref.fsio import write_text
    from qpref.recipe.resolve import make_plan

    if output is not None:
        refuse_existing(output, overwrite)
    quiet_transformers()
    draft = convert(file, output.parent if output else Path(), tool, trainer, num_gpus)  # type: ignore[arg-type]
    text = recipe_text(draft, f"Converted from {file.name} by `qpref convert`.")
    try:
        make_plan(draft.document())
    except RecipeError as error:
        _, *problems = error.what.splitlines()
        raise RecipeError("\n".join([f"{file}: it lacks what a recipe needs", *problems]), error.hint) from None
    if output is None:
        echo(text.rstrip())
    else:
        write_text(output, text)
        echo(f"recipe: {output}", err=True)
    for line in remarks(draft, file.name):
        echo(line, err=True)
