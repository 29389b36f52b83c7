"""Training of a sweep's points in one process, each as `qpref train` alone would."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from qpref import fsio, locks
from qpref.errors import DeviceMemoryError, QprefError, RecipeError, StoppedBySignal
from qpref.hooks.process_state import ProcessState
from qpref.policy.kept_base import KeptBase, free_unreachable
from qpref.recipe.plan import Plan
from qpref.sweep.points import Point, in_order_of_training
from qpref.training.folder import RunFolder
from qpref.training.run import refuse_other_recipe, train_plan

log = logging.getLogger("qpref")

REPORT = "report.html"


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """The end of a point's run: a finished run, or an error with its exit code."""

    point: Point
    error: str | None = None
    exit_code: int = 0


def refused(point: Point) -> Result:
    """Return the result of a point without a plan."""
    assert point.refusal is not None
    return Result(point=point, error=str(point.refusal), exit_code=point.refusal.exit_code)


@contextmanager
def claimed_sweep(folder: Path, points: Sequence[Point], resume: bool, overwrite: bool) -> Iterator[None]:
    """Lock a sweep's folder, which is removed again if nothing comes into it.

    Raises:
        RecipeError: it holds runs of these points and neither `resume` nor `overwrite` is set, or is a run itself.
        CheckpointError: a point's folder holds the run of another recipe, which `resume` would continue.
        RunLockedError: another process trains a sweep in it.
    """
    if resume and overwrite:
        raise RecipeError("--resume and --overwrite exclude each other")
    if folder.exists() and not folder.is_dir():
        raise RecipeError(f"{folder}: is a file; a sweep needs a folder")
    if RunFolder(folder).run_json.exists():
        raise RecipeError(f"{folder}: holds a run; a sweep has a folder for each of its runs", "use another --output")
    for point in points:
        if point.plan is not None and not overwrite:
            _refuse_use(point.plan, resume)
    existed = folder.is_dir()
    fsio.make_folder(folder)
    with locks.locked(folder):
        try:
            yield
        finally:
            if not existed and [entry.name for entry in folder.iterdir()] == [locks.NAME]:
                fsio.remove_tree(folder)


def _refuse_use(plan: Plan, resume: bool) -> None:
    folder = RunFolder(plan.output)
    if not folder.run_json.exists():
        return
    if not resume:
        raise RecipeError(
            f"{folder.path}: holds a run", "continue with --resume, replace the runs with --overwrite, or use --output"
        )
    with suppress(RecipeError):  # damaged records, which the run's own resumption may restore
        refuse_other_recipe(plan, folder, folder.description())


def train_points(points: Sequence[Point], *, resume: bool, overwrite: bool) -> Iterator[Result]:
    """Train the points that have a plan, and yield the result of each.

    A point that fails is one result; the others are trained all the same. Between two points the process's settings and
    random numbers are set back, and what a run has left in memory is freed, but for the base.

    Raises:
        StoppedBySignal: a signal asked to stop; the run that it stopped is saved.
    """
    kept, before = KeptBase(), ProcessState.now(random_numbers=True)
    ordered = in_order_of_training(points)
    for number, point in enumerate(ordered, 1):
        log.info("sweep: run %d of %d, %s", number, len(ordered), point.name)
        yield _trained(point, kept, resume=resume, overwrite=overwrite)
        before.restore()
        free_unreachable()


def _trained(point: Point, kept: KeptBase, *, resume: bool, overwrite: bool) -> Result:
    assert point.plan is not None
    continues = resume and RunFolder(point.plan.output).run_json.exists()
    try:
        train_plan(point.plan, resume=continues, overwrite=overwrite, kept=kept)
    except StoppedBySignal:
        raise
    except QprefError as error:
        # The error itself holds the frames of its traceback, and so the run's tensors.
        return Result(point=point, error=str(error), exit_code=error.exit_code)
    except MemoryError:
        text = "this machine ran out of memory"
        return Result(point=point, error=text, exit_code=DeviceMemoryError.exit_code)
    return Result(point=point)
