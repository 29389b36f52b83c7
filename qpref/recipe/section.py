"""The base of every table that the core itself reads from a recipe."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """One table of the recipe: unknown keys are errors, values are not coerced."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)
    refused: ClassVar[Mapping[str, str]] = {}
    """Keys of other trainers, or of an older qpref, -> the message that refuses them."""
