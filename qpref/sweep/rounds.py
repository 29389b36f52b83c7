"""Rounds: one recipe trained several times in a row, each from the adapter of the round before, which is its reference.

Gorbatovski et al. 2024, "Learn Your Reference Model for Real Good Alignment": TR-DPO with hard updates of the
reference, here for any loss with a reference. With a reward, in the recipe's `[rounds]`, each round has preferences of
its own: see `qpref.sweep.on_policy`.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from qpref.errors import CheckpointError, RecipeError
from qpref.hooks.process_state import ProcessState
from qpref.policy.kept_base import KeptBase, free_unreachable
from qpref.recipe.choices import joint_needs
from qpref.recipe.document import read_document, with_overrides
from qpref.recipe.resolve import make_plan
from qpref.sweep.points import Point
from qpref.training.folder import RunFolder
from qpref.training.prepare import start_digest
from qpref.training.run import train_plan

log = logging.getLogger("qpref")

SKIPPED = 0.5
"""Share of a round's sampled preferences that may be refused, unless the recipe has one: a model may write a control
character, which no row may hold."""


def make_rounds(recipe: Path, count: int, overrides: Sequence[str], output: Path) -> list[Point]:
    """Plan the rounds: the first as the recipe is, each later one with `[adapter] start` at the one before.

    With `[rounds]` in the recipe, each round's data are the preferences that are sampled for it.

    Args:
        overrides: `--set` of all rounds.
        output: folder of their run folders, `round-1` and so on.

    Raises:
        RecipeError: the recipe has mistakes, or none of its losses has a reference to move on.
        PluginError: a plugin that the recipe names is broken, or offered twice.
    """
    document = with_overrides(read_document(recipe), overrides)
    is_on_policy = "rounds" in document
    points: list[Point] = []
    start: tuple[str, ...] = ()
    for number in range(1, count + 1):
        name = f"round-{number}"
        varied = (*(_sampled_data(preferences_path(output, name), document) if is_on_policy else ()), *start)
        plan = make_plan(recipe, [*overrides, *varied], output / name)
        if not is_on_policy and "reference" not in joint_needs(loss.at(0.0) for loss in plan.losses):
            raise RecipeError(
                "rounds move the reference on, and the recipe's losses need none",
                "qpref train, with more epochs; or [rounds] in the recipe, for preferences of each round's own",
            )
        points.append(Point(name=name, overrides=varied, plan=plan))
        adapter = RunFolder((output / name).absolute()).adapter
        start = (f"adapter.start={json.dumps(str(adapter), ensure_ascii=False)}",)
    return points


def has_reward(recipe: Path, overrides: Sequence[str]) -> bool:
    """Return whether a recipe has `[rounds]`, and so preferences for each round of its own."""
    return "rounds" in with_overrides(read_document(recipe), overrides)


def preferences_path(folder: Path, name: str) -> Path:
    """Return the file of a round's sampled preferences."""
    return folder / f"{name}.jsonl"


def _sampled_data(file: Path, document: Mapping[str, Any]) -> tuple[str, ...]:
    """Name a round's sampled preferences as its data, whatever the recipe says of those that it names."""
    path = json.dumps(str(file.absolute()), ensure_ascii=False)
    data = f'data.train=[{{ path = {path}, reader = "jsonl", format = "auto", columns = {{}} }}]'
    own = document.get("data")
    has_bound = isinstance(own, dict) and "skip_bad" in own
    return (data,) if has_bound else (data, f"data.skip_bad={SKIPPED}")


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
            refuse_other_start(point)
        train_plan(point.plan, resume=continues, overwrite=overwrite, kept=kept)
        before.restore()
        free_unreachable()
        yield point


def refuse_other_start(point: Point) -> None:
    """Refuse to keep a round whose start adapter isn't what the round before has written."""
    assert point.plan is not None
    folder, start = RunFolder(point.plan.output), point.plan.recipe.adapter.start
    if folder.description()["fingerprints"]["start adapter"] != start_digest(start):
        raise CheckpointError(
            f"{folder.path}: was trained from another adapter than {start} is now",
            "remove this round and those after it, or start over with --overwrite",
        )
