"""Numeric options on a schedule over the run: `beta = { start = 0.1, end = 0.3, schedule = "linear" }`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, ValidationError

from qpref.errors import RecipeError


class Schedule(BaseModel):
    """A number that goes from `start`, at the first optimizer step, to `end`, at the last."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)

    start: float
    end: float
    schedule: Literal["linear", "cosine"] = "linear"

    def at(self, progress: float) -> float:
        """Return the value at `progress` of the run, 0 to 1; exactly `start` at 0 and `end` at 1."""
        done = progress if self.schedule == "linear" else (1 - math.cos(math.pi * progress)) / 2
        value = self.start * (1 - done) + self.end * done
        return min(max(value, min(self.start, self.end)), max(self.start, self.end))  # rounding could leave the range


@dataclass(frozen=True, slots=True)
class Scheduled:
    """A plugin's options, some of them on a schedule.

    Attributes:
        first: the options at the first step.
        schedules: option name -> its schedule.
    """

    first: BaseModel
    schedules: Mapping[str, Schedule]

    def at(self, progress: float) -> Any:
        """Return the options at `progress` of the run, 0 to 1, checked like those of a recipe.

        Raises:
            RecipeError: a value between start and end is outside its option's range.
        """
        if not self.schedules:
            return self.first
        changed = {name: schedule.at(progress) for name, schedule in self.schedules.items()}
        try:
            return type(self.first).model_validate(self.first.model_dump() | changed)
        except ValidationError as error:
            reason = error.errors()[0]
            name = reason["loc"][0] if reason["loc"] else next(iter(changed))
            message = reason["msg"].removeprefix("Value error, ")
            raise RecipeError(f"[loss] {name}: after {progress:.0%} of its schedule: {message}") from None

    @property
    def given(self) -> frozenset[str]:
        """Names of the options that the recipe sets, or that follow a schedule; the others have their defaults."""
        return frozenset(self.first.model_fields_set) | self.schedules.keys()

    def document(self) -> dict[str, Any]:
        """Return the options as TOML data."""
        tables = {name: schedule.model_dump(mode="json") for name, schedule in self.schedules.items()}
        return self.first.model_dump(mode="json", exclude_none=True) | tables


def can_be_scheduled(model: type[BaseModel], option: str) -> bool:
    """Return whether an option is a float, and so can follow a schedule."""
    field = model.model_fields.get(option)
    return field is not None and (field.annotation is float or float in get_args(field.annotation))
