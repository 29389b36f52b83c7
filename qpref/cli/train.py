"""`qpref train`"""

from __future__ import annotations

import os
from pathlib import Path

import click

from qpref import locks
from qpref.cli.options import set_option
from qpref.cli.output import echo


@click.command("train")
@click.argument("recipe", type=click.Path(path_type=Path))
@set_option
@click.option("--output", type=click.Path(path_type=Path), help="Run folder.  [default: runs/<recipe's name>]")
@click.option("--resume", is_flag=True, help="Continue from the newest checkpoint in the run folder.")
@click.option("--overwrite", is_flag=True, help="Replace the run in the run folder.")
@click.option("--dry-run", is_flag=True, help="Print the resolved recipe and its plugins, without training.")
def command(
    recipe: Path, overrides: tuple[str, ...], output: Path | None, resume: bool, overwrite: bool, dry_run: bool
) -> None:
    """Train a LoRA adapter from RECIPE, a TOML file."""
    from qpref.recipe.resolve import make_plan, run_folder_of

    if not dry_run and os.environ.get("RANK", "0") == "0":  # a launcher's other processes write nothing
        locks.refuse_held(run_folder_of(recipe, output))  # in a moment: plugins and the trainer import torch
    plan = make_plan(recipe, overrides, output)
    if dry_run:
        import tomli_w

        echo(tomli_w.dumps(plan.document).rstrip())
        echo(f"\n# run folder: {plan.output}")
        for offer in sorted({plugin.offer for plugin in plan.plugins}):
            echo(f"# {offer}")
        return
    from qpref.cli import quiet_transformers
    from qpref.training.run import train_plan

    quiet_transformers()
    folder = train_plan(plan, resume=resume, overwrite=overwrite)
    echo(f"run folder: {folder}")
