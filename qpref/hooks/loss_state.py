"""Numbers that a loss keeps from one optimizer step to the next, such as a moving average.

A loss reads them and returns new ones; it keeps nothing itself. So a step that is repeated for lack of memory, a check
at the start and an evaluation leave no trace, and a checkpoint has all of them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from qpref.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor

Initial = Mapping[str, float | Sequence[float]]
"""Name -> first value, as a loss's record has it."""
State = Mapping[str, "Tensor"]
"""Name -> value. Of several losses, the position of each and a dot come before its names: `0.m0`."""


def initial_problem(initial: Any) -> str | None:
    """Explain why a record's `state` can't be one; None where it can."""
    if not isinstance(initial, Mapping) or not all(isinstance(name, str) and name for name in initial):
        return f"has the state {initial!r}, not numbers by name"
    for name, value in initial.items():
        numbers = value if isinstance(value, Sequence) and not isinstance(value, str) else [value]
        if not all(type(number) in (int, float) and math.isfinite(number) for number in numbers):
            return f"begins with {name} = {value!r} in its state, not with finite numbers"
    return None


def state_of(initial: Initial, known: State, like: Tensor) -> dict[str, Tensor]:
    """Return a loss's state for one call: what is known of it, else its first values.

    Args:
        like: gives dtype and device.
    """
    import torch

    found = {name: known.get(name) for name in initial}
    return {
        name: torch.tensor(initial[name], dtype=like.dtype, device=like.device)
        if value is None
        else value.to(like.device, like.dtype)
        for name, value in found.items()
    }


def written_problem(before: State, written: Any) -> str | None:
    """Explain why what a loss returned can't be its state after the step; None where it can."""
    if not isinstance(written, Mapping):
        return f"returned its state as {type(written).__name__}, not by name"
    for name, value in written.items():
        if name not in before:
            return f"returned {name!r} in its state, which its record doesn't have"
        if not isinstance(value, type(before[name])) or value.shape != before[name].shape:
            found = f"of shape {tuple(value.shape)}" if hasattr(value, "shape") else type(value).__name__
            return f"returned {name} of its state as {found}, not of shape {tuple(before[name].shape)}"
        if value.requires_grad:
            return f"returned {name} of its state with a gradient; detach it"
    return None


def of_loss(state: State, position: int) -> dict[str, Tensor]:
    """Return the part of one of several losses, under its own names."""
    prefix = f"{position}."
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}


def joined(states: Sequence[State]) -> dict[str, Tensor]:
    """Join the states of several losses, each under its position."""
    return {f"{position}.{name}": value for position, state in enumerate(states) for name, value in state.items()}


def refuse_other_state(saved: State, initial: Sequence[Initial], step: int) -> None:
    """Refuse the state of other losses than a run's.

    Args:
        saved: of a checkpoint.
        initial: of each of the run's losses.
        step: the checkpoint's.

    Raises:
        CheckpointError: a name or a shape is another.
    """
    import torch

    shapes = {name: torch.tensor(value).shape for name, value in joined(initial).items()}  # type: ignore[arg-type]
    for name, value in saved.items():
        if shapes.get(name) != value.shape:
            raise CheckpointError(
                f"step {step}: its losses keep {name} of shape {tuple(value.shape)}, which this run's losses don't",
                "install the version of the loss's plugin that the run was started with",
            )
