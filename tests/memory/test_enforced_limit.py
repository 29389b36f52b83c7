"""The memory limit: enforced on a GPU, cut to what is free, and reset by the next run."""

from __future__ import annotations

import pytest
import torch

from qpref.memory import limit as module
from qpref.memory.limit import allocator_share, enforced_limit
from qpref.memory.parts import FRAGMENTATION, GIB, LIBRARY_BYTES, PREDICTION_ERROR, MemoryParts
from qpref.recipe.sections import Recipe

CUDA = torch.device("cuda", 0)
FREE, TOTAL = 22 * GIB, 24 * GIB


@pytest.fixture
def shares(monkeypatch) -> list[float]:
    """What torch is told on a card with 22 of 24 GiB free; there is none here."""
    told: list[float] = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (FREE, TOTAL))
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda share, device: told.append(share))
    return told


def recipe_with(make_recipe, memory: str | None) -> Recipe:
    return Recipe.model_validate(make_recipe({"model.memory": memory} if memory else {}))


@pytest.mark.parametrize("wsl", [False, True])
def test_the_recipes_figure_is_enforced_less_the_libraries(wsl, shares, make_recipe, monkeypatch):
    monkeypatch.setattr(module, "is_wsl", lambda: wsl)
    assert enforced_limit(recipe_with(make_recipe, "8GiB"), CUDA) == 8 * GIB
    assert shares == [(8 * GIB - LIBRARY_BYTES["cuda"]) / TOTAL]


def test_a_figure_above_the_free_memory_is_cut_to_it(shares, make_recipe, said):
    assert enforced_limit(recipe_with(make_recipe, "23.9GiB"), CUDA) == FREE
    assert shares == [(FREE - LIBRARY_BYTES["cuda"]) / TOTAL]
    assert said == ["memory: [model] memory is 23.90 GiB, and 22.00 GiB are free"]


def test_without_a_figure_an_earlier_runs_is_lifted(shares, make_recipe, monkeypatch):
    monkeypatch.setattr(module, "is_wsl", lambda: False)
    enforced_limit(recipe_with(make_recipe, "8GiB"), CUDA)
    assert enforced_limit(recipe_with(make_recipe, None), CUDA) == FREE
    assert shares[1] == 1.0


def test_a_driver_that_spills_is_held_to_the_free_memory(shares, make_recipe, monkeypatch):
    monkeypatch.setattr(module, "is_wsl", lambda: True)
    assert enforced_limit(recipe_with(make_recipe, None), CUDA) == FREE
    assert shares == [(FREE - LIBRARY_BYTES["cuda"]) / TOTAL]


def test_a_share_is_one_that_torch_accepts():
    assert allocator_share(100 * GIB, TOTAL) == 1.0
    assert allocator_share(1, TOTAL) == 0.0


def test_what_the_plan_gives_to_tensors_is_what_the_allocator_may_take():
    sizes = {"weights": 4 * GIB, "adapters": GIB, "optimizer": GIB, "activations": GIB, "live": 0, "head_tile": 0}
    parts = MemoryParts(**sizes, fixed_reserve=LIBRARY_BYTES["cuda"])
    used = parts.total - parts.reserve
    assert used * (1 + FRAGMENTATION + PREDICTION_ERROR) <= allocator_share(parts.total, TOTAL) * TOTAL + 1
