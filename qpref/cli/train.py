"""`qpref train`"""

from __future__ import annotations

import logging
import shlex
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from qpref import locks
from qpref.cli.options import set_option
from qpref.cli.output import JsonHandler, echo, echo_event
from qpref.distributed.environment import is_first, num_processes
from qpref.errors import RecipeError

if TYPE_CHECKING:
    from qpref.hooks.types import Printing
    from qpref.recipe.plan import Plan


NEXT = {
    "eval": ("", "held-out pairs, with intervals"),
    "chat": ("", "talk to base and trained model"),
    "report": ("", "the run as an HTML page"),
    "merge": (" merged", "a plain model folder"),
}
"""Commands that use a finished run: further arguments, and what they give."""


@click.command("train")
@click.argument("recipe", type=click.Path(path_type=Path))
@set_option
@click.option("--output", type=click.Path(path_type=Path), help="Run folder.  [default: runs/<recipe's name>]")
@click.option("--resume", is_flag=True, help="Continue from the newest checkpoint in the run folder.")
@click.option("--overwrite", is_flag=True, help="Replace the run in the run folder.")
@click.option("--gpus", type=click.IntRange(min=1), metavar="N", help="Train on N GPUs of this machine, by torchrun.")
@click.option("--processes", type=click.IntRange(min=1), metavar="N", help="Train in N processes on the CPU.")
@click.option("--quiet", "-q", is_flag=True, help="Print warnings and errors alone.")
@click.option(
    "--log-json",
    is_flag=True,
    help="Print JSON objects, one a line, on standard output: metrics, messages, and the result at the end.",
)
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
    quiet: bool,
    log_json: bool,
    dry_run: bool,
) -> None:
    """Train a LoRA adapter from RECIPE, a TOML file."""
    printing = _printing(quiet, log_json)
    from qpref.recipe.requirements import refuse_missing
    from qpref.recipe.resolve import make_plan, run_folder_of

    if not dry_run and is_first():  # a launcher's other processes write nothing
        locks.refuse_held(run_folder_of(recipe, output))  # in a moment: plugins and the trainer import torch
    if gpus is not None or processes is not None:
        overrides = (*overrides, f"model.device={'cpu' if gpus is None else 'cuda'}")
    plan = replace(make_plan(recipe, overrides, output), printing=printing)
    refuse_missing(plan.sinks)
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
        arguments += ["--quiet"] if quiet else []
        arguments += ["--log-json"] if log_json else []
        context.exit(launch("qpref", arguments, count, plan.recipe.distributed.timeout))
    from qpref.cli import quiet_transformers
    from qpref.training.run import train_plan

    quiet_transformers()
    folder = train_plan(plan, resume=resume, overwrite=overwrite)
    if is_first():
        _print_result(folder, printing)


def _printing(quiet: bool, log_json: bool) -> Printing:
    """Set up the log for the form of output that the options name, and return it.

    Raises:
        RecipeError: they exclude each other.
    """
    if quiet and log_json:
        raise RecipeError("--quiet and --log-json exclude each other")
    logger = logging.getLogger("qpref")
    if log_json:
        logger.handlers = [JsonHandler()]
        return "json"
    if quiet:
        logger.setLevel(logging.WARNING)
        return "nothing"
    return "text"


def _print_result(folder: Path, printing: Printing) -> None:
    """Print a finished run's verdict, and the commands that use it."""
    from qpref import sealed
    from qpref.cli import COMMANDS
    from qpref.training.folder import RunFolder

    if printing == "nothing":
        return
    verdict = sealed.read_sealed(RunFolder(folder).result).get("verdict")
    if printing == "json":
        echo_event("result", run_folder=str(folder), verdict=verdict)
        return
    if verdict is not None:
        echo(f"verdict: {verdict['sentence']}")
    echo(f"run folder: {folder}")
    echo("next:")
    for name, (arguments, effect) in NEXT.items():
        if name in COMMANDS:
            echo(f"  qpref {name} {shlex.quote(str(folder))}{arguments}  # {effect}")


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
