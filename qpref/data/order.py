"""Order of training: which examples each optimizer step takes, and how many steps a run has."""

from __future__ import annotations

import math
import random
from array import array
from collections.abc import Sequence
from functools import lru_cache

from qpref.errors import RecipeError
from qpref.recipe.sections import Recipe, TrainSection


def step_order(num_examples: int, batch_size: int, seed: int, step: int) -> list[int]:
    """Choose the examples of optimizer step `step` (from 0), by index.

    A pure function of its arguments, so a resumed run needs no cursor. Every epoch is a new shuffle; its last step
    takes what remains.
    """
    epoch, within = divmod(step, steps_per_epoch(num_examples, batch_size))
    return list(_epoch_order(num_examples, seed, epoch)[within * batch_size : (within + 1) * batch_size])


@lru_cache(maxsize=2)
def _epoch_order(num_examples: int, seed: int, epoch: int) -> Sequence[int]:
    """Shuffle an epoch; cached, since every step of the epoch reads a slice of it."""
    order = array("l", range(num_examples))
    random.Random(f"{seed}/{epoch}").shuffle(order)
    return order


def steps_per_epoch(num_examples: int, batch_size: int) -> int:
    return math.ceil(num_examples / batch_size)


def total_steps(train: TrainSection, num_examples: int) -> int:
    """Count the optimizer steps of the whole run."""
    planned = train.epochs * steps_per_epoch(num_examples, train.batch_size)
    return planned if train.max_steps is None else min(planned, train.max_steps)


def refuse_empty_steps(recipe: Recipe, num_examples: int) -> None:
    """Refuse data that don't fill one optimizer step.

    Raises:
        RecipeError: there is no example, or the batch is larger than the data and would never have the recipe's size.
    """
    if not num_examples:
        raise RecipeError("[data] train: the sources' weights leave no training example", "raise them")
    if num_examples < recipe.train.batch_size:
        raise RecipeError(
            f"[train] batch_size is {recipe.train.batch_size}, and there are {num_examples} training examples",
            f"set batch_size to {num_examples} or less",
        )
