"""Which step did best on the held-out examples so far, and whether it is worth going on."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from qpref.errors import CheckpointError, RecipeError
from qpref.recipe.sections import TrainSection, is_better_higher
from qpref.training import checkpoint
from qpref.training.folder import RunFolder

log = logging.getLogger("qpref")


@dataclass(frozen=True, slots=True)
class Best:
    """The best held-out row so far.

    Attributes:
        waited: held-out rows since then.
    """

    step: int
    value: float
    waited: int = 0

    def as_state(self) -> dict[str, Any]:
        """For a checkpoint."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Watch:
    """What a recipe wants to be best.

    Attributes:
        name: of the metric, without eval_.
        higher: whether more of it is better.
        patience: held-out rows without a better one after which to stop; None never to.
    """

    name: str
    higher: bool
    patience: int | None

    @classmethod
    def of(cls, train: TrainSection) -> Watch | None:
        """None where the last step is the result."""
        if train.best_by is None:
            return None
        name = train.best_by.removeprefix("eval_")
        higher = is_better_higher(train.best_by) if train.best_direction is None else train.best_direction == "max"
        assert higher is not None  # the recipe has been checked
        return cls(name, higher, train.patience)

    def look(self, best: Best | None, step: int, values: Mapping[str, float]) -> Best | None:
        """The best so far, this row included.

        The row of step 0 is no candidate: nothing is trained yet, and its accuracy by reward is one by log-probability.
        A value that isn't a number is never better, and a tie isn't either.

        Raises:
            RecipeError: held-out rows have no such metric.
        """
        if self.name not in values:
            raise RecipeError(
                f"[train] best_by: held-out rows have no metric '{self.name}'; they have {', '.join(sorted(values))}"
            )
        value = values[self.name]
        if step == 0:
            return best
        if not math.isnan(value) and (best is None or (value > best.value if self.higher else value < best.value)):
            return Best(step, value)
        return None if best is None else Best(best.step, best.value, best.waited + 1)

    def is_over(self, best: Best | None) -> bool:
        """Whether enough rows went by without a better one."""
        return self.patience is not None and best is not None and best.waited >= self.patience


def of_state(state: Mapping[str, Any], folder: RunFolder, train: TrainSection) -> Best | None:
    """The best of a checkpoint's state; where its own checkpoint isn't what it was, the best of those that are left.

    Only a step whose checkpoint verifies can be shipped, so a lost one must not hide the next best.

    Args:
        folder: its metrics.jsonl is at least as long as it was at that checkpoint.
    """
    found, watch = state.get("best"), Watch.of(train)
    if found is None or watch is None:
        return None
    best = Best(**found)
    reason = _damage(folder, best.step)
    if reason is None:
        return best
    again = _best_left(folder, int(state["metrics_bytes"]), watch)
    left = "no other is left" if again is None else f"step {again.step} is the best of those that are left"
    log.warning("the best step so far, %d, is lost, and %s: %s", best.step, left, reason)
    return again


def _best_left(folder: RunFolder, metrics_bytes: int, watch: Watch) -> Best | None:
    """The best of the held-out rows so far whose steps' checkpoints verify; the others count as waited for."""
    best: Best | None = None
    with folder.metrics.open("rb") as file:
        lines = file.read(metrics_bytes).splitlines()
    for line in lines:
        try:
            row = json.loads(line)
        except ValueError:
            continue  # a damaged row is no candidate
        if not isinstance(row, dict) or row.get("split") != "eval":
            continue
        value = row.get(f"eval_{watch.name}")
        if value is None or _damage(folder, row["step"]) is not None:
            value = math.nan
        best = watch.look(best, row["step"], {watch.name: value})
    return best


def _damage(folder: RunFolder, step: int) -> str | None:
    """Why a step's checkpoint doesn't verify; None where it does."""
    try:
        checkpoint.read(checkpoint.path_of(folder.checkpoints, step))
    except CheckpointError as error:
        return error.what
    return None
