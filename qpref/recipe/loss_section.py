"""The recipe's `[loss]` table, or one of its `[[loss]]` tables: the keys that no loss has as options of its own."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, field_validator

from qpref.recipe.schedule import Schedule


class LossSection(BaseModel):
    """The loss, or with `[[loss]]` one term of a weighted sum; the other keys are its own options."""

    model_config = ConfigDict(strict=True, extra="allow", frozen=True, allow_inf_nan=False)

    name: str = Field(min_length=1, description="Name of the loss.")
    weight: Annotated[float, Field(gt=0)] | Schedule = Field(
        default=1.0, description="Factor on this loss in the sum; on a schedule it may begin or end at 0."
    )

    @field_validator("weight")
    @classmethod
    def refuse_negative_weight(cls, weight: float | Schedule) -> float | Schedule:
        """Refuse a schedule that goes below 0, or never leaves it."""
        ends = (weight.start, weight.end) if isinstance(weight, Schedule) else (weight,)
        if min(ends) < 0 or max(ends) == 0:
            raise ValueError("a weight is at least 0 at both ends of its schedule, and above 0 at one of them")
        return weight
