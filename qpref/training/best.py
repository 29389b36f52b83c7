"""The best step by a held-out metric so far, and early stopping once no better one has come for long enough."""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from qpref import opening
from qpref.errors import CheckpointError, RecipeError
from qpref.recipe.sections import TrainSection, is_better_higher
from qpref.training import checkpoint
from qpref.training.folder import RunFolder

log = logging.getLogger("qpref")


@dataclass(frozen=True, slots=True)
class Best:
    """The best held-out row so far.

    Attributes:
        step: optimizer steps done by then.
        value: of the metric that it is the best by.
        waited: held-out rows since then.
    """

    step: int
    value: float
    waited: int = 0

    def as_state(self) -> dict[str, Any]:
        """Convert to JSON values for a checkpoint."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Criterion:
    """The metric that a recipe chooses its best step by.

    Attributes:
        metric: its name, without eval_.
        is_better_higher: True where a higher value is a better one.
        patience: held-out rows without a better one after which to stop; None to never stop early.
    """

    metric: str
    is_better_higher: bool
    patience: int | None

    @classmethod
    def of(cls, train: TrainSection) -> Criterion | None:
        """Read the recipe's criterion; None where the last step is the result."""
        if train.best_by is None:
            return None
        name = train.best_by.removeprefix("eval_")
        higher = is_better_higher(train.best_by) if train.best_direction is None else train.best_direction == "max"
        assert higher is not None  # the recipe has been checked
        return cls(name, higher, train.patience)

    def update(self, best: Best | None, step: int, means: Mapping[str, float]) -> Best | None:
        """Compare a held-out row with the best one before it; returns the better of the two.

        The row of step 0 is no candidate: nothing is trained yet, and its accuracy by reward is one by log-probability.
        NaN is never better, and neither is a tie.

        Raises:
            RecipeError: held-out rows have no such metric.
        """
        if self.metric not in means:
            raise RecipeError(
                f"[train] best_by: held-out rows have no metric '{self.metric}'; they have {', '.join(sorted(means))}"
            )
        value = means[self.metric]
        if step == 0:
            return best
        if not math.isnan(value) and (best is None or self._is_better(value, best.value)):
            return Best(step, value)
        return None if best is None else Best(best.step, best.value, best.waited + 1)

    def _is_better(self, value: float, other: float) -> bool:
        return value > other if self.is_better_higher else value < other

    def is_out_of_patience(self, best: Best | None) -> bool:
        """Return whether `patience` held-out rows have passed without a better one."""
        return self.patience is not None and best is not None and best.waited >= self.patience


def restore_best(state: Mapping[str, Any], folder: RunFolder, train: TrainSection) -> Best | None:
    """Read the best step from a checkpoint's state; if its own checkpoint is damaged, the best of the remaining ones.

    Only a step whose checkpoint verifies can be exported, so a lost one must not hide the next best.

    Args:
        folder: its metrics.jsonl is at least as long as it was at that checkpoint.
    """
    found, criterion = state.get("best"), Criterion.of(train)
    if found is None or criterion is None:
        return None
    best = Best(**found)
    reason = _damage(folder, best.step)
    if reason is None:
        return best
    remaining = _best_remaining(folder, int(state["metrics_bytes"]), criterion)
    left = "no other is left" if remaining is None else f"step {remaining.step} is the best of those that are left"
    log.warning("the best step so far, %d, is lost, and %s: %s", best.step, left, reason)
    return remaining


def _best_remaining(folder: RunFolder, metrics_bytes: int, criterion: Criterion) -> Best | None:
    """Find the best held-out row whose step's checkpoint verifies; every later row counts towards the patience."""
    best: Best | None = None
    with os.fdopen(opening.open_plain(folder.metrics), "rb") as file:
        lines = file.read(metrics_bytes).splitlines()
    for line in lines:
        try:
            row = json.loads(line)
        except ValueError:
            continue  # a damaged row is no candidate
        if not isinstance(row, dict) or row.get("split") != "eval":
            continue
        value = row.get(f"eval_{criterion.metric}")
        if value is None or _damage(folder, row["step"]) is not None:
            value = math.nan
        best = criterion.update(best, row["step"], {criterion.metric: value})
    return best


def _damage(folder: RunFolder, step: int) -> str | None:
    """Explain why a step's checkpoint doesn't verify; None where it does."""
    try:
        checkpoint.read(checkpoint.path_of(folder.checkpoints, step))
    except CheckpointError as error:
        return error.what
    return None
