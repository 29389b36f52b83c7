"""The base of every plugin's options model."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field

__all__ = ["Field", "Options"]


class Options(BaseModel):
    """The keys of a plugin's table in the recipe, with their ranges and defaults. Unknown keys are refused."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)
