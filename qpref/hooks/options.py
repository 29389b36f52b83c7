"""The base of every plugin's options model."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field

__all__ = ["Field", "Options", "TrackerOptions"]


class Options(BaseModel):
    """The keys of a plugin's table in the recipe, with their ranges and defaults. Unknown keys are refused."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)


class TrackerOptions(Options):
    """Options that all sinks to experiment trackers have; each adds its own."""

    run_name: str | None = Field(default=None, description="Name of the run. Without it, the run folder's.")
    tags: tuple[str, ...] = Field(default=(), strict=False, description="Tags of the run.")
    samples: int = Field(
        default=0,
        ge=0,
        le=1000,
        description="Number of held-out examples whose texts are sent as a table. 0 sends no text.",
    )
