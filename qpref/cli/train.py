"""`qpref train`"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from qpref import locks
from qpref.cli.options import set_option
from qpref.cli.output import echo
from qpref.distributed.environment import is_first, num_processes
from qpref.errors import RecipeError

if TYPE_CHECKING:
    from qpref.recipe.plan import Plan


@click.command("train")
@click.argument("recipe", type=click.Path(path_type=Path))
@set_option
@click.option("--output", type=click.Path(path_type=Path), help="Run folder.  [default: runs/<recipe's name>]")
@click.option("--resume", is_flag=True, help="Continue from the newest checkpoint in the run folder.")
@click.option("--overwrite", is_flag=True, help="Replace the run in the run folder.")
@click.option("--gpus", type=click.IntRange(min=1), metavar="N", help="Train on N GPUs of this machine, by torchrun.")
@click.option("--processes", type=click.IntRange(min=1), metavar="N", help="Train in N processes on the CPU.")
@click.option("--dry-run", is_flag=True, help="Print the resolved recipe and its plugins, without training.")
@click.pass_context
def command(
    context: click.Context,
    recipe: Path,
    overrides: tuple[str, ...],
    output: Path | None,
    resume: bool,
    overwrite: bool,
    gpus: int | None,
    processes: int | None,
    dry_run: bool,
) -> None:
    """Train a LoRA adapter from RECIPE, a TOML file."""
    from qpref.recipe.resolve import make_plan, run_folder_of

    if not dry_run and is_first():  # a launcher's other processes write nothing
        locks.refuse_held(run_folder_of(recipe, output))  # in a moment: plugins and the trainer import torch
    if gpus is not None or processes is not None:
        overrides = (*overrides, f"model.device={'cpu' if gpus is None else 'cuda'}")
    plan = make_plan(recipe, overrides, output)
    if dry_run:
        if is_first():
            _print_plan(plan)
        return
    if (count := _num_processes(gpus, processes)) > 1:
        from qpref.distributed.launch import launch

        arguments = ["train", str(recipe)]
        arguments += [part for override in overrides for part in ("--set", override)]
        arguments += ["--output", str(output)] if output else []
        arguments += ["--resume"] if resume else []
        arguments += ["--overwrite"] if overwrite else []
        context.exit(launch("qpref", arguments, count, plan.recipe.distributed.timeout))
    from qpref.cli import quiet_transformers
    from qpref.training.run import train_plan

    quiet_transformers()
    folder = train_plan(plan, resume=resume, overwrite=overwrite)
    if is_first():
        echo(f"run folder: {folder}")


def _num_processes(gpus: int | None, processes: int | None) -> int:
    """Return the number of processes to start; 1 for this one alone.

    Raises:
        RecipeError: this machine has fewer GPUs, or this process is one of several already.
    """
    if gpus is None and processes is None:
        return 1
    if gpus is not None and processes is not None:
        raise RecipeError("--gpus and --processes exclude each other: processes are for a CPU")
    option = "--gpus" if gpus is not None else "--processes"
    if num_processes() > 1:
        raise RecipeError(
            f"{option} starts processes, and this is already one of {num_processes()} (WORLD_SIZE)",
            f"leave {option} out under torchrun",
        )
    if gpus is not None:
        import torch

        found = torch.cuda.device_count()
        if gpus > found:
            has = "no GPU that torch sees" if found == 0 else f"{found} GPU{'s' if found > 1 else ''}"
            raise RecipeError(f"--gpus {gpus}: this machine has {has}", "--processes N trains on a CPU")
    return gpus or processes or 1


def _print_plan(plan: Plan) -> None:
    import tomli_w

    echo(tomli_w.dumps(plan.document).rstrip())
    echo(f"\n# run folder: {plan.output}")
    for offer in sorted({plugin.offer for plugin in plan.plugins}):
        echo(f"# {offer}")
