"""Processes that share a base compute what one process with all of it computes, and find a base that has changed."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import rows_of
from processes import fork_ranks, start_forks
from safetensors.torch import load_file
from sharded import CHECKS, FAULTS, checked, computed, loading, read_bases, trained, verified
from tiny_models import TinyModel

from qpref.distributed.world import World
from qpref.policy import token_scores, vocabulary
from qpref.recipe.resolve import make_plan
from qpref.training.run import train_plan

COUNTS = {2: [3, 1], 4: [2, 0, 1, 1]}
"""Examples of each process: processes have different numbers of passes."""
FLOAT32 = {"quantization": "nf4", "dtype": "float32"}


@pytest.fixture(scope="module")
def cases(make_base: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Name -> number of processes and recipe: an untied head; a tied one, biases, dropout and layers that keep
    their activations; capped and scaled logits, fewer tokens than four equal parts have; experts."""
    experts = TinyModel(model_type="qwen3_moe").write(tmp_path_factory.mktemp("base") / "experts")
    adapter = {"rank": 4, "alpha": 8}
    return {
        "untied": (2, {"model": FLOAT32 | {"base": str(make_base())}, "adapter": adapter}),
        "tied": (
            2,
            {
                "model": FLOAT32 | {"base": str(make_base("qwen")), "double_quantization": False},
                "adapter": adapter | {"dropout": 0.2},
                "train": {"gradient_checkpointing": False},
            },
        ),
        "gemma": (4, {"model": FLOAT32 | {"base": str(make_base("gemma3"))}, "adapter": adapter}),
        "experts": (2, {"model": FLOAT32 | {"base": str(experts)}, "adapter": adapter | {"experts": True}}),
    }


@pytest.mark.parametrize("name", ["untied", "tied", "gemma", "experts"])
def test_a_shared_base_gives_the_scores_and_the_gradient_of_a_whole_one(name, cases, monkeypatch):
    size, tables = cases[name]
    if name == "gemma":
        score_a_few_at_a_time(monkeypatch, 12)
    ranks = fork_ranks(size, computed, tables, COUNTS[size])
    alone = computed(World(), tables, [sum(COUNTS[size])])
    for kind in ("scores", "partners"):
        _assert_close([value for rank in ranks for value in rank[kind]], alone[kind])
    # The first process begins with the first example, as one process does.
    for kind in ("references", "squares", "entropy"):
        length = min(len(ranks[0][kind]), len(alone[kind]))
        assert length
        _assert_close(ranks[0][kind][:length], alone[kind][:length])
    expected = torch.tensor(alone["gradients"])
    for rank in ranks:
        assert (torch.tensor(rank["gradients"]) - expected).norm() / expected.norm() < 1e-6
        assert rank["gradients"] == ranks[0]["gradients"]


def score_a_few_at_a_time(monkeypatch: pytest.MonkeyPatch, most: int) -> None:
    """Let processes score fewer rows together than one of them has."""
    sum_rows = token_scores._sum_rows

    def few(rows: Any, *rest: Any) -> Any:
        assert len(rows.tokens) <= most or rest[0].rows is None
        return sum_rows(rows, *rest)

    monkeypatch.setattr(vocabulary, "SHARED_ROWS", most)
    monkeypatch.setattr(token_scores, "_sum_rows", few)


def _assert_close(together: list[float], alone: list[float]) -> None:
    torch.testing.assert_close(torch.tensor(together), torch.tensor(alone), rtol=1e-6, atol=1e-6)


@pytest.fixture(scope="module")
def faults(cases) -> list[dict[str, str]]:
    return fork_ranks(2, verified, cases["untied"][1])


def test_a_sound_base_verifies_and_goes_on_to_after_a_fault(faults):
    for rank in faults:
        assert rank["sound"] == ""
        assert rank["restored"] == ""


@pytest.mark.parametrize("fault", FAULTS)
def test_every_process_refuses_a_base_that_has_changed_in_one_and_names_the_weight(fault, faults):
    for rank in faults:
        said = rank[fault]
        assert said.startswith("PolicyError 10: the base has changed since it was loaded: rank")
        part = {"scales": "scales", "code": "weight (quantization)"}.get(fault, "weight")
        assert f"the first is model.layers.1.mlp.gate_proj.{part}\n" in said


def test_a_weight_that_is_not_gathered_cannot_be_computed_with(faults):
    """So a gathering that is missing in a recomputation is an error and no wrong gradient."""
    for rank in faults:
        assert "quant_state" in rank["ungathered"]


def test_processes_that_read_different_weights_refuse_to_share_them(make_base):
    bases = [str(make_base()), str(make_base(initializer_range=0.03))]
    for index, said in enumerate(fork_ranks(2, read_bases, bases)):
        assert said.startswith(f"PolicyError 10: ranks {index} and {1 - index} read ")
        assert "the first is lm_head.weight\n" in said


@pytest.mark.parametrize("check", CHECKS)
def test_memory_that_one_process_lacks_in_a_check_of_the_start_ends_all(check, cases, tmp_path):
    """It can't repeat the check with fewer tokens: the others wait in the middle of its pass."""
    outcomes = start_forks(2, checked, cases["untied"][1], check, "full", str(tmp_path), timeout=20)
    assert [each.code for each in outcomes] == [5, 5], [each.output for each in outcomes]
    errors = [line for each in outcomes for line in each.output.splitlines() if line.startswith("error: ")]
    assert errors == [errors[0]]
    assert errors[0].startswith("error: rank 1: the device ran out of memory in the check")


@pytest.mark.parametrize("event", ["killed", "killed while sharing"])
def test_a_process_that_dies_in_a_layer_is_no_fault_of_the_layer(event, cases, tmp_path):
    first, second = start_forks(2, checked, cases["untied"][1], "layout", event, str(tmp_path), timeout=20)
    assert (first.code, second.code) == (13, -signal.SIGKILL), first.output
    assert "error: rank 1 died at " in first.output
    assert "prompts are computed once for each response" not in first.output


def test_loading_takes_a_process_its_part_and_one_layer(make_base):
    sizes = {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 16}
    base = make_base(dtype=torch.bfloat16, num_attention_heads=8, num_key_value_heads=8, **sizes)
    layer = 2 * (4 * 512 * 512 + 3 * 512 * 1408)
    (alone,), parts = fork_ranks(1, loading, str(base)), fork_ranks(2, loading, str(base))
    assert 16 * layer > 100e6
    for part in parts:
        assert part["held"] < alone["held"] / 2 + 1e6  # norms, and the table of embeddings
        assert part["peak"] < part["held"] + layer


def test_a_run_with_a_shared_base_writes_the_adapter_of_one_process(make_recipe, tmp_path):
    document = make_recipe(
        {
            "model.quantization": "nf4",
            "adapter.dropout": 0.1,
            "train.max_steps": 2,
            "train.gradient_checkpointing": True,
            "distributed.shard_base": True,
        }
    )
    shared = {Path(found) for found in fork_ranks(2, trained, document, str(tmp_path))}
    assert shared == {tmp_path / "shared"}
    alone = train_plan(make_plan(document, output=tmp_path / "alone"))
    ours, expected = (load_file(run / "adapter" / "adapter_model.safetensors") for run in (*shared, alone))
    assert ours.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (ours[name] - tensor).abs().max() < 1e-5, name
    assert [row.keys() for row in rows_of(*shared)] == [row.keys() for row in rows_of(alone)]
