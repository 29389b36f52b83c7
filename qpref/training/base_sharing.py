"""The choice of `[distributed] shard_base`: a copy of the base for each process, or one that they share."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from qpref.distributed.world import World
from qpref.memory.demand import Demand, Workload
from qpref.memory.scaling import which_mode
from qpref.memory.setup import Setup
from qpref.memory.shape import model_shape
from qpref.memory.tune import lengths_of
from qpref.policy.load import choose_device
from qpref.policy.source import BaseFolder
from qpref.recipe.sections import Recipe
from qpref.records import TokenizedExample

log = logging.getLogger("qpref")


def sharing(
    recipe: Recipe, base: BaseFolder, world: World, examples: Sequence[TokenizedExample], limit: int
) -> World | None:
    """Return the processes that share the base; None where each has a copy.

    Args:
        limit: bytes that this process may fill.
    """
    setting = recipe.distributed.shard_base
    if world.size == 1:
        if setting is True:
            log.warning("[distributed] shard_base: one process has the whole base; --gpus starts more")
        return None
    if setting == "auto":
        limits = world.exchange(limit, "the memory limits")
        setting = which_mode(_demand(recipe, base, examples), min(limits), world.size) == "sharded"
    if setting:
        log.info("base: shared by %d processes, each has a part and gathers one layer after the other", world.size)
    return world if setting else None


def _demand(recipe: Recipe, base: BaseFolder, examples: Sequence[TokenizedExample]) -> Demand:
    """Predict what a process with the whole base needs."""
    shape = model_shape(recipe.model, recipe.adapter, str(base.path))
    kind = choose_device(recipe.model.device).type
    setup = Setup.of(recipe, "cuda" if kind == "cuda" else "cpu", shape)
    return Demand.of(recipe, shape, setup, Workload.of(map(lengths_of, examples), recipe.train.batch_size))
