"""Processes that share a base compute what one process with all of it computes, and find a base that has changed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from expert_cases import KINDS
from processes import run_ranks
from sharded import FAULTS, all_cases, computed

from qpref.distributed.world import World

COUNTS = {2: [3, 1], 4: [2, 0, 1, 1]}
"""Examples of each process: processes have different numbers of passes."""
FLOAT32 = {"quantization": "nf4", "dtype": "float32"}


@pytest.fixture(scope="module")
def cases(make_base: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Name -> number of processes and recipe: an untied head; a tied one, biases and layers that keep their
    activations; capped and scaled logits, fewer tokens than four equal parts have; experts."""
    experts = KINDS["qwen3_moe"].write(tmp_path_factory.mktemp("base") / "experts")
    adapter = {"rank": 4, "alpha": 8}
    return {
        "untied": (2, {"model": FLOAT32 | {"base": str(make_base())}, "adapter": adapter}),
        "tied": (
            2,
            {
                "model": FLOAT32 | {"base": str(make_base("qwen")), "double_quantization": False},
                "adapter": adapter,
                "train": {"gradient_checkpointing": False},
            },
        ),
        "gemma": (4, {"model": FLOAT32 | {"base": str(make_base("gemma3"))}, "adapter": adapter}),
        "experts": (2, {"model": FLOAT32 | {"base": str(experts)}, "adapter": adapter | {"experts": True}}),
    }


@pytest.fixture(scope="module")
def of_ranks(cases: dict[str, Any], make_base: Callable[..., Path]) -> dict[int, list[dict[str, Any]]]:
    """Number of processes -> what each of them returned, of all cases."""
    other = make_base(rms_norm_eps=1e-5, initializer_range=0.03)
    found = {}
    for size in (2, 4):
        tables = {name: (tables, COUNTS[size]) for name, (ranks, tables) in cases.items() if ranks == size}
        faults = cases["untied"][1] if size == 2 else {}
        bases = [str(make_base()), str(other)] if size == 2 else []
        found[size] = run_ranks(size, all_cases, tables, faults, bases, timeout=400)
    return found


@pytest.mark.parametrize("name", ["untied", "tied", "gemma", "experts"])
def test_a_shared_base_gives_the_scores_and_the_gradient_of_a_whole_one(name, cases, of_ranks):
    size, tables = cases[name]
    ranks = [each[name] for each in of_ranks[size]]
    alone = computed(World(), tables, [sum(COUNTS[size])])
    for kind in ("scores", "partners"):
        together = torch.tensor([value for rank in ranks for value in rank[kind]])
        torch.testing.assert_close(together, torch.tensor(alone[kind]), rtol=1e-6, atol=1e-6)
    first = ranks[0]
    for kind in ("references", "squares"):  # of the first example, which the first process has
        length = min(len(first[kind]), len(alone[kind]), 7)
        assert length
        torch.testing.assert_close(
            torch.tensor(first[kind][:length]), torch.tensor(alone[kind][:length]), rtol=1e-6, atol=1e-6
        )
    expected = torch.tensor(alone["gradients"])
    for rank in ranks:
        difference = (torch.tensor(rank["gradients"]) - expected).norm() / expected.norm()
        assert difference < 1e-6
    assert ranks[0]["gradients"] == ranks[-1]["gradients"]


def test_a_sound_base_verifies_and_goes_on_to_after_a_fault(of_ranks):
    for rank in of_ranks[2]:
        assert rank["faults"]["sound"] == ""
        assert rank["faults"]["restored"] == ""


@pytest.mark.parametrize("fault", FAULTS)
def test_every_process_refuses_a_base_that_has_changed_in_one_and_names_the_weight(fault, of_ranks):
    for rank in of_ranks[2]:
        said = rank["faults"][fault]
        assert said.startswith("PolicyError 10: the base has changed since it was loaded: rank")
        part = {"scales": "scales", "code": "weight (quantization)"}.get(fault, "weight")
        assert f"the first is model.layers.1.mlp.gate_proj.{part}\n" in said


def test_a_weight_that_is_not_gathered_cannot_be_computed_with(of_ranks):
    """So a gathering that is missing in a recomputation is an error and no wrong gradient."""
    for rank in of_ranks[2]:
        assert "quant_state" in rank["faults"]["ungathered"]


def test_processes_that_read_different_weights_refuse_to_share_them(of_ranks):
    for index, rank in enumerate(of_ranks[2]):
        assert rank["bases"].startswith(f"PolicyError 10: ranks {index} and {1 - index} read ")
        assert "the first is" in rank["bases"]
