"""`qpref rounds`"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from qpref import locks
from qpref.cli.options import json_option, set_option
from qpref.cli.output import echo
from qpref.cli.sweep import print_results, result_as_json, without_metrics
from qpref.cli.tables import print_table

if TYPE_CHECKING:
    from qpref.evaluation.statistics import Estimate
    from qpref.sweep.on_policy import Progress
    from qpref.sweep.points import Point


@click.command("rounds")
@click.argument("recipe", type=click.Path(path_type=Path))
@click.option("--rounds", "count", type=click.IntRange(min=1), required=True, metavar="N", help="Number of rounds.")
@set_option
@click.option("--output", type=click.Path(path_type=Path), help="Folder of the runs.  [default: runs/<recipe>-rounds]")
@click.option("--resume", is_flag=True, help="Continue: keep finished rounds, resume and train the others.")
@click.option("--overwrite", is_flag=True, help="Replace the runs in their folders.")
@click.option("--quiet", "-q", is_flag=True, help="Print warnings, errors and the table alone.")
@json_option
def command(
    recipe: Path,
    count: int,
    overrides: tuple[str, ...],
    output: Path | None,
    resume: bool,
    overwrite: bool,
    quiet: bool,
    as_json: bool,
) -> None:
    """Train RECIPE in rounds: each starts from the adapter of the one before, which is its reference.

    With [rounds] in the recipe, each round samples responses from the policy, a reward ranks them, and the round trains
    on these preferences. Its reward and its KL from the base are measured on held-out prompts. The first round whose
    reward doesn't rise beyond noise, or whose KL exceeds the budget, is the last.

    Each round has a folder of its own, and is a run like any other. The first round that fails ends the command.
    """
    folder = output or Path("runs") / f"{recipe.stem}-rounds"
    locks.refuse_held(folder)  # in a moment: plugins and the trainer import torch
    from qpref.cli import quiet_transformers
    from qpref.report.write import write_report
    from qpref.sweep.rounds import has_reward, make_rounds, train_rounds
    from qpref.sweep.training import REPORT, Result, claimed_sweep

    points = make_rounds(recipe, count, overrides, folder)
    is_on_policy = has_reward(recipe, overrides)
    if quiet:
        logging.getLogger("qpref").setLevel(logging.WARNING)
    if quiet or as_json:
        points = [without_metrics(point) for point in points]
    quiet_transformers()
    if is_on_policy:
        _run_on_policy(folder, points, resume, overwrite, as_json)
        return
    finished = []
    with claimed_sweep(folder, points, resume, overwrite):
        for point in train_rounds(points, resume=resume, overwrite=overwrite):
            finished.append(folder / point.name)
            write_report(finished, folder / REPORT)
    results = [Result(point=point) for point in points]
    if as_json:
        echo(json.dumps([result_as_json(result, folder) for result in results], indent=2))
    else:
        print_results(results, folder)


def _run_on_policy(folder: Path, points: Sequence[Point], resume: bool, overwrite: bool, as_json: bool) -> None:
    """Do the rounds, write the report after each, and print where the reward and the KL have gone."""
    from qpref.report.write import Extras, write_report
    from qpref.sweep.on_policy import OnPolicyRounds
    from qpref.sweep.training import REPORT, claimed_sweep

    with claimed_sweep(folder, points, resume, overwrite):
        for progress in OnPolicyRounds(folder, points, resume=resume, overwrite=overwrite).run():
            if progress.rounds:
                finished = [folder / one.point.name for one in progress.rounds]
                write_report(finished, folder / REPORT, Extras(rounds=_for_report(progress)))
    if as_json:
        echo(json.dumps(_as_json(progress, folder), indent=2))
    else:
        _print_rounds(progress, folder)


def _as_json(progress: Progress, folder: Path) -> dict[str, Any]:
    from qpref.sampling.measure import estimate_as_json
    from qpref.sweep.training import Result

    rounds = [
        result_as_json(Result(point=one.point), folder)
        | {
            "pairs": one.pairs,
            "sampled_reward": one.sampled_reward,
            "heldout": one.measured.summary(),
            "gain": estimate_as_json(one.gain),
            "refused": one.refusal,
        }
        for one in progress.rounds
    ]
    result = progress.result
    return {
        "start": {"heldout": progress.start.summary()},
        "rounds": rounds,
        "result": None if result is None else str(folder / result.point.name),
        "ended": progress.ended,
    }


def _rows(progress: Progress) -> list[tuple[str, ...]]:
    """Lay out the policy before training and after each round, a header first."""
    header = ("ROUND", "PAIRS", "REWARD (95 %)", "GAIN (95 %)", "KL FROM BASE", "FROM START", "ACCEPTED")
    start = progress.start
    first = ("start", "", _text(start.reward), "", f"{start.kl_from_base.value:.2f}", "", "")
    return [
        header,
        first,
        *(
            (
                one.point.name,
                str(one.pairs),
                _text(one.measured.reward),
                _text(one.gain, "+"),
                f"{one.measured.kl_from_base.value:.2f}",
                f"{one.measured.kl_from_start.value:.2f}",
                "no" if one.refusal else "yes",
            )
            for one in progress.rounds
        ),
    ]


def _text(estimate: Estimate, sign: str = "") -> str:
    return f"{estimate.value:{sign}.3f} ({estimate.low:{sign}.3f} to {estimate.high:{sign}.3f})"


def _for_report(progress: Progress) -> list[dict[str, str]]:
    header, *rows = _rows(progress)
    return [dict(zip(map(str.lower, header), row, strict=True)) for row in rows]


def _print_rounds(progress: Progress, folder: Path) -> None:
    from qpref.sweep.training import REPORT

    print_table(_rows(progress))
    if progress.ended:
        echo(f"ended: {progress.ended}")
    result = progress.result
    echo("result: none, no round was accepted" if result is None else f"result: {folder / result.point.name}")
    if progress.rounds:
        echo(f"report: {folder / REPORT}")
