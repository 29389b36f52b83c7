"""Comparison of the facts that the processes of a run must have in common before they train together."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from qpref.distributed.world import World
from qpref.errors import RecipeError

LONGEST = 60
"""Characters of a value that a message shows; longer ones are digests, which say nothing."""


def refuse_differences(world: World, facts: Mapping[str, Any], what: str) -> None:
    """Compare facts (of what JSON can hold) of all processes by name; all have to be equal.

    Args:
        what: the facts' kind, such as "recipes".

    Raises:
        RecipeError: in every process, naming the ranks that differ from rank 0, and in what.
    """
    first, *others = world.exchange(dict(facts), what)
    problems = []
    for rank, other in enumerate(others, start=1):
        names = [name for name in {**first, **other} if first.get(name) != other.get(name)]
        problems += [f"rank {rank} has {_difference(name, other.get(name), first.get(name))}" for name in names]
    if problems:
        raise RecipeError(
            "the processes of the run don't have the same: " + "; ".join(problems),
            "all of them need one recipe, the same data and base, and the same versions",
        )


def _difference(name: str, other: Any, first: Any) -> str:
    values = [json.dumps(value, ensure_ascii=False) for value in (other, first)]
    if max(map(len, values)) > LONGEST or None in (other, first):
        return f"another {name} than rank 0" if other is not None else f"no {name}"
    return f"{name} = {values[0]}, and rank 0 {values[1]}"


def digest(tensors: Iterable[Tensor]) -> str:
    """Hash the bytes of tensors, in their order."""
    found = hashlib.blake2b(digest_size=16)
    for tensor in tensors:
        content = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        found.update(content.numpy().tobytes())
    return found.hexdigest()
