"""Rounds: one recipe trained several times in a row, each from the adapter of the round before, which is its reference.

Gorbatovski et al. 2024, "Learn Your Reference Model for Real Good Alignment": TR-DPO with hard updates of the
reference, here for any loss with a reference.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path

from qpref.errors import CheckpointError, RecipeError
from qpref.hooks.process_state import ProcessState
from qpref.policy.kept_base import KeptBase, free_unreachable
from qpref.recipe.choices import joint_needs
from qpref.recipe.resolve import make_plan
from qpref.sweep.points import Point
from qpref.training.folder import RunFolder
from qpref.training.prepare import start_digest
from qpref.training.run import train_plan

log = logging.getLogger("qpref")


def make_rounds(recipe: Path, count: int, overrides: Sequence[str], output: Path) -> list[Point]:
    """Plan the rounds: the first as the recipe is, each later one with `[adapter] start` at the one before.

    Args:
        overrides: `--set` of all rounds.
        output: folder of their run folders, `round-1` and so on.

    Raises:
        RecipeError: the recipe has mistakes, or none of its losses has a reference to move on.
        PluginError: a plugin that the recipe names is broken, or offered twice.
    """
    points: list[Point] = []
    start: tuple[str, ...] = ()
    for number in range(1, count + 1):
        name = f"round-{number}"
        plan = make_plan(recipe, [*overrides, *start], output / name)
        if "reference" not in joint_needs(loss.at(0.0) for loss in plan.losses):
            raise RecipeError(
                "rounds move the reference on, and the recipe's losses need none", "qpref train, with more epochs"
            )
        points.append(Point(name=name, overrides=start, plan=plan))
        adapter = RunFolder((output / name).absolute()).adapter
        start = (f"adapter.start={json.dumps(str(adapter), ensure_ascii=False)}",)
    return points


def train_rounds(points: Sequence[Point], *, resume: bool, overwrite: bool) -> Iterator[Point]:
    """Train the rounds one after the other over one base in memory, and yield each when it is finished.

    Raises:
        CheckpointError: `resume` would keep a round that was trained from another adapter.
        QprefError: a round failed; those after it aren't trained.
    """
    kept, before = KeptBase(), ProcessState.now(random_numbers=True)
    for number, point in enumerate(points, 1):
        assert point.plan is not None
        log.info("round %d of %d", number, len(points))
        continues = resume and RunFolder(point.plan.output).run_json.exists()
        if continues:
            _refuse_other_start(point)
        train_plan(point.plan, resume=continues, overwrite=overwrite, kept=kept)
        before.restore()
        free_unreachable()
        yield point


def _refuse_other_start(point: Point) -> None:
    """Refuse to keep a round whose start adapter isn't what the round before has written."""
    assert point.plan is not None
    folder, start = RunFolder(point.plan.output), point.plan.recipe.adapter.start
    if folder.description()["fingerprints"]["start adapter"] != start_digest(start):
        raise CheckpointError(
            f"{folder.path}: was trained from another adapter than {start} is now",
            "remove this round and those after it, or start over with --overwrite",
        )
