"""Options that change over a run, whichever is a number: `beta = { start = 0.1, end = 0.3, schedule = "linear" }`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, ValidationError

from qpref.errors import RecipeError


class Schedule(BaseModel):
    """How one number goes from `start`, at the first optimizer step, to `end`, at the last."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)

    start: float
    end: float
    schedule: Literal["linear", "cosine"] = "linear"

    def at(self, progress: float) -> float:
        """The value at `progress` of the run, 0 to 1; exactly `start` and `end` at its ends."""
        done = progress if self.schedule == "linear" else (1 - math.cos(math.pi * progress)) / 2
        value = self.start * (1 - done) + self.end * done
        return min(max(value, min(self.start, self.end)), max(self.start, self.end))  # rounding could lead out


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
        """The options at `progress` of the run, 0 to 1, checked like any recipe's.

        Raises:
            RecipeError: a value between the ends is out of its option's range.
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

    def document(self) -> dict[str, Any]:
        """The options as TOML data."""
        tables = {name: schedule.model_dump(mode="json") for name, schedule in self.schedules.items()}
        return self.first.model_dump(mode="json", exclude_none=True) | tables


def can_be_scheduled(model: type[BaseModel], option: str) -> bool:
    """Whether an option is a number that need not be whole."""
    field = model.model_fields.get(option)
    return field is not None and (field.annotation is float or float in get_args(field.annotation))
