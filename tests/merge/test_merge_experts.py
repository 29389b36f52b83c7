"""Experts at merge: the files' tensors, one for each expert, are what training computed with, and what they learned."""

from __future__ import annotations

import json

import pytest
import torch
from edited_runs import reseal
from merge_cases import logits_of, merge, merged_logits, moved, trained_policy
from safetensors.torch import load_file, save_file
from tiny_models import TinyModel

from qpref.errors import MergeError
from qpref.merging.guards import read_run
from qpref.policy.experts import through_nf4
from qpref.recipe.resolve import make_plan
from qpref.training.run import train_plan

NF4 = {"model.quantization": "nf4"}
ADAPTED = NF4 | {"adapter.experts": True, "train.learning_rate": 5e-3}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """`base(kind)`: the folder of a tiny model, made once."""
    made = {}

    def make(kind):
        if kind not in made:
            made[kind] = TinyModel(model_type=kind).write(tmp_path_factory.mktemp(kind))
        return made[kind]

    return make


def tensors_of(*folders):
    return [load_file(folder / "model.safetensors") for folder in folders]


@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss"])
def test_a_merged_model_has_the_experts_that_were_trained_with(kind, base, trained_run, tmp_path):
    run = trained_run(base(kind), **NF4)
    result = merge(run, tmp_path / "out", "float32")
    assert result.verdict.passed
    assert (merged_logits(tmp_path / "out") - logits_of(trained_policy(run).model)).abs().max() < 1e-4
    before, after = tensors_of(base(kind), tmp_path / "out")
    assert before.keys() == after.keys()


@pytest.mark.parametrize(
    ("kind", "changes"),
    [("mixtral", {}), ("gpt_oss", {}), ("qwen3_moe", {"model.quantization": "none"})],
    ids=["mixtral", "gpt_oss", "qwen3_moe"],
)
def test_what_experts_have_learned_is_merged_into_the_files_own_layout(kind, changes, base, trained_run, tmp_path):
    run = trained_run(base(kind), **ADAPTED | changes)
    result = merge(run, tmp_path / "out", "float32")
    assert result.verdict.passed
    assert result.kept["float32"] == pytest.approx(1, abs=1e-6)
    assert (merged_logits(tmp_path / "out") - logits_of(trained_policy(run).model)).abs().max() < 1e-4
    before, after = tensors_of(base(kind), tmp_path / "out")
    assert {name: value.shape for name, value in before.items()} == {name: value.shape for name, value in after.items()}


def test_onto_the_original_every_expert_moves_by_its_own_adapter_alone(base, trained_run, tmp_path):
    """W1 and W3 of an expert are the halves of its delta, by PEFT's order of A and B; alpha is 8 and the rank 4."""
    run = trained_run(base("mixtral"), **ADAPTED)
    merge(run, tmp_path / "out", "float32", onto="original")
    before, after = tensors_of(base("mixtral"), tmp_path / "out")
    adapter = load_file(run / "adapter/adapter_model.safetensors")
    outer = "base_model.model.model.layers.1.mlp.experts"
    for expert in range(4):
        first, second = (
            2 * adapter[f"{name}.lora_B.weight"][:, expert::4] @ adapter[f"{name}.lora_A.weight"][4 * expert :][:4]
            for name in (f"{outer}.base_layer", outer)
        )
        for name, delta in zip(("w1", "w3", "w2"), (*first.chunk(2), second), strict=True):
            key = f"model.layers.1.block_sparse_moe.experts.{expert}.{name}.weight"
            assert delta.abs().max() > 1e-4
            assert torch.allclose(after[key] - before[key], delta, atol=1e-6)


def test_a_run_that_started_from_an_adapter_on_experts_is_merged(base, make_recipe, trained_run, tmp_path):
    first = trained_run(base("mixtral"), **ADAPTED)
    recipe = make_recipe({"model.base": str(base("mixtral")), "train.max_steps": 1} | NF4)
    recipe["adapter"] = {"start": str(first / "adapter")}
    run = train_plan(make_plan(recipe, output=tmp_path / "run"))
    verdict = merge(run, tmp_path / "out", "float32").verdict
    assert verdict.passed
    assert 0 < verdict.learned < merge(first, tmp_path / "first", "float32").verdict.learned / 2
    assert (merged_logits(tmp_path / "out") - logits_of(trained_policy(run).model)).abs().max() < 1e-4


def test_settings_without_the_runs_experts_are_refused(base, trained_run, tmp_path):
    run, _ = moved(trained_run(base("mixtral"), **ADAPTED), base("mixtral"), tmp_path / "moved")
    path = run / "adapter/adapter_config.json"
    settings = json.loads(path.read_text())
    path.write_text(json.dumps(settings | {"target_parameters": None}))
    reseal(run)
    with pytest.raises(MergeError, match=r"target_parameters don't fit the run's \[adapter\] experts"):
        read_run(run)
    path.write_text(json.dumps(settings | {"target_parameters": ["experts.gate_up_proj"]}))
    reseal(run)
    with pytest.raises(MergeError, match=r"has no weight for model\.layers\.0\.mlp\.experts\.base_layer"):
        read_run(run)


@pytest.mark.parametrize(
    ("rows", "problem"),
    [(7, r"A of .*experts.down_proj has 7 rows, which aren't a rank for each of 4"), (0, "have no rank in common")],
)
def test_matrices_that_fit_no_number_of_experts_are_refused(rows, problem, base, trained_run, tmp_path):
    run, _ = moved(trained_run(base("mixtral"), **ADAPTED), base("mixtral"), tmp_path / "moved")
    path = run / "adapter/adapter_model.safetensors"
    name = "base_model.model.model.layers.0.mlp.experts"
    cut = {f"{name}.lora_A.weight": torch.ones(rows, 128), f"{name}.lora_B.weight": torch.ones(64, rows)}
    save_file(load_file(path) | cut, path)
    reseal(run)
    with pytest.raises(MergeError, match=problem):
        read_run(run)


def test_an_expert_is_rounded_with_the_tensors_that_it_is_fused_with(base, trained_run):
    opened = read_run(trained_run(base("mixtral"), **NF4)).base
    (before,) = tensors_of(base("mixtral"))
    names = [f"model.layers.1.block_sparse_moe.experts.2.{name}.weight" for name in ("w1", "w3")]
    fused, rounded = torch.cat([before[name] for name in names]), torch.cat([opened.as_trained(name) for name in names])
    assert torch.equal(through_nf4(fused[None], double_quantization=True)[0], rounded)


def test_onto_the_original_the_experts_stay_as_they_are(base, trained_run, tmp_path):
    merge(trained_run(base("mixtral"), **NF4), tmp_path / "out", "float32", onto="original")
    before, after = tensors_of(base("mixtral"), tmp_path / "out")
    experts = [name for name in before if ".experts." in name]
    assert experts
    assert all(torch.equal(before[name], after[name]) for name in experts)
