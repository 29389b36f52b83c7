"""Parts of a recipe's `[[loss]]` tables: schedules, weights, and what several losses must have in common."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pydantic import BaseModel, ValidationError

from qpref.recipe.choices import LossChoice
from qpref.recipe.loss_section import LossSection
from qpref.recipe.problems import Problem, problems_of
from qpref.recipe.schedule import Schedule, can_be_scheduled


def schedules_of(table: Mapping[str, Any], options: type[BaseModel], where: str) -> dict[str, Schedule] | list[Problem]:
    """Parse the numeric options that are tables `{ start, end, schedule }`; a bad one's problems are returned."""
    schedules = {}
    for key, value in table.items():
        if isinstance(value, dict) and can_be_scheduled(options, key):
            try:
                schedules[key] = Schedule.model_validate(value)
            except ValidationError as error:
                return problems_of(error, Schedule, f"{where}.{key}")
    return schedules


def weight_of(table: Mapping[str, Any]) -> float | Schedule | None:
    """Parse a loss's weight; None for a bad one, which the recipe's own tables report."""
    try:
        return LossSection.model_validate({key: table[key] for key in ("name", "weight") if key in table}).weight
    except ValidationError:
        return None


def joint_problems(losses: Sequence[LossChoice]) -> Iterator[Problem]:
    """Yield what keeps losses from being added."""
    units = list(dict.fromkeys(loss.plugin.record.unit for loss in losses))
    if len(units) > 1:
        names = " and ".join(f"'{loss.plugin.record.name}'" for loss in losses)
        yield Problem("loss", "", f"{names}: one is on {units[0]}, another on {units[1]}")
    if losses and not all(sum(loss.weight_at(end) for loss in losses) for end in (0.0, 1.0)):
        yield Problem("loss", "weight", "0 for all losses at one end of the run")
