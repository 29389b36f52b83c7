"""`qpref train`"""

from __future__ import annotations

from pathlib import Path

import click


@click.command("train")
@click.argument("recipe", type=click.Path(path_type=Path))
@click.option("--set", "overrides", multiple=True, metavar="TABLE.KEY=VALUE", help="Change one value of the recipe.")
@click.option("--output", type=click.Path(path_type=Path), help="Run folder.  [default: runs/<recipe's name>]")
@click.option("--resume", is_flag=True, help="Go on from the run folder's newest checkpoint.")
@click.option("--overwrite", is_flag=True, help="Replace the run that stands in the folder.")
@click.option("--dry-run", is_flag=True, help="Resolve the recipe and its plugins, print them, and stop.")
def command(
    recipe: Path, overrides: tuple[str, ...], output: Path | None, resume: bool, overwrite: bool, dry_run: bool
) -> None:
    """Train an adapter by RECIPE, a TOML file."""
    from qpref.recipe.resolve import make_plan

    plan = make_plan(recipe, overrides, output)
    if dry_run:
        import tomli_w

        click.echo(tomli_w.dumps(plan.document).rstrip())
        click.echo(f"\n# run folder: {plan.output}")
        for offer in sorted({plugin.offer for plugin in plan.plugins}):
            click.echo(f"# {offer}")
        return
    from qpref.cli import quiet_transformers
    from qpref.training.run import train_plan

    quiet_transformers()
    folder = train_plan(plan, resume=resume, overwrite=overwrite)
    click.echo(f"run folder: {folder}")
