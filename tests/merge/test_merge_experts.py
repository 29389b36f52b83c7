"""Experts in 4 bits at merge: the files' tensors, one for each expert, are what training computed with."""

from __future__ import annotations

import json

import pytest
import torch
from edited_runs import reseal
from merge_cases import logits_of, merge, merged_logits, moved, trained_policy
from safetensors.torch import load_file
from tiny_models import TinyModel

from qpref.errors import MergeError
from qpref.policy.experts import through_nf4
from qpref.recipe.resolve import make_plan
from qpref.training.run import train_plan


@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss"])
def test_a_merged_model_has_the_experts_that_were_trained_with(kind, trained_run, tmp_path):
    run = trained_run(TinyModel(model_type=kind).write(tmp_path / "base"), **{"model.quantization": "nf4"})
    result = merge(run, tmp_path / "out", "float32")
    assert result.verdict.passed
    assert (merged_logits(tmp_path / "out") - logits_of(trained_policy(run).model)).abs().max() < 1e-4
    before, after = (load_file(tmp_path / folder / "model.safetensors") for folder in ("base", "out"))
    assert before.keys() == after.keys()


ADAPTED = {"adapter.experts": True, "train.learning_rate": 5e-3}


@pytest.mark.parametrize(
    ("kind", "quantization"),
    [("mixtral", "nf4"), ("qwen3_moe", "none"), ("gpt_oss", "nf4")],
)
def test_what_experts_have_learned_is_merged_into_the_files_own_layout(kind, quantization, trained_run, tmp_path):
    base = TinyModel(model_type=kind).write(tmp_path / "base")
    run = trained_run(base, **ADAPTED | {"model.quantization": quantization})
    result = merge(run, tmp_path / "out", "float32")
    assert result.verdict.passed
    assert result.kept["float32"] == pytest.approx(1, abs=1e-6)
    assert (merged_logits(tmp_path / "out") - logits_of(trained_policy(run).model)).abs().max() < 1e-4
    before, after = (load_file(tmp_path / folder / "model.safetensors") for folder in ("base", "out"))
    assert {name: value.shape for name, value in before.items()} == {name: value.shape for name, value in after.items()}


def test_onto_the_original_every_expert_moves_by_its_own_adapter_alone(trained_run, tmp_path):
    """W1 and W3 of an expert are the halves of its delta, by PEFT's order of A and B."""
    run = trained_run(TinyModel(model_type="mixtral").write(tmp_path / "base"), **ADAPTED)
    merge(run, tmp_path / "out", "float32", onto="original")
    before, after = (load_file(tmp_path / folder / "model.safetensors") for folder in ("base", "out"))
    adapter = load_file(run / "adapter/adapter_model.safetensors")
    inner, outer = (
        "base_model.model.model.layers.1.mlp.experts.base_layer",
        "base_model.model.model.layers.1.mlp.experts",
    )
    for expert in range(4):
        first, second = (
            8
            / 4
            * adapter[f"{name}.lora_B.weight"][:, expert::4]
            @ adapter[f"{name}.lora_A.weight"][4 * expert : 4 * expert + 4]
            for name in (inner, outer)
        )
        for name, delta in zip(("w1", "w3", "w2"), (*first.chunk(2), second), strict=True):
            key = f"model.layers.1.block_sparse_moe.experts.{expert}.{name}.weight"
            assert delta.abs().max() > 1e-4
            assert torch.allclose(after[key] - before[key], delta, atol=1e-6)


def test_a_run_that_started_from_an_adapter_on_experts_is_merged(make_recipe, trained_run, tmp_path):
    base = TinyModel(model_type="qwen3_moe").write(tmp_path / "base")
    first = trained_run(base, **ADAPTED | {"model.quantization": "nf4"})
    recipe = make_recipe({"model.base": str(base), "model.quantization": "nf4", "train.max_steps": 1})
    recipe["adapter"] = {"start": str(first / "adapter")}
    run = train_plan(make_plan(recipe, output=tmp_path / "run"))
    verdict = merge(run, tmp_path / "out", "float32").verdict
    assert verdict.passed
    assert 0 < verdict.learned < merge(first, tmp_path / "first", "float32").verdict.learned / 2
    assert (merged_logits(tmp_path / "out") - logits_of(trained_policy(run).model)).abs().max() < 1e-4


def test_settings_without_the_runs_experts_are_refused(trained_run, tmp_path):
    base = TinyModel(model_type="mixtral").write(tmp_path / "base")
    run, _ = moved(trained_run(base, **ADAPTED), base, tmp_path / "moved")
    path = run / "adapter/adapter_config.json"
    settings = json.loads(path.read_text())
    path.write_text(json.dumps(settings | {"target_parameters": None}))
    reseal(run)
    with pytest.raises(MergeError, match=r"target_parameters don't fit the run's \[adapter\] experts"):
        merge(run, tmp_path / "out")
    path.write_text(json.dumps(settings | {"target_parameters": ["experts.gate_up_proj"]}))
    reseal(run)
    with pytest.raises(MergeError, match=r"has no weight for model\.layers\.0\.mlp\.experts\.base_layer"):
        merge(run, tmp_path / "out")


def test_an_expert_is_rounded_with_the_tensors_that_it_is_fused_with(trained_run, tmp_path):
    run = trained_run(TinyModel(model_type="mixtral").write(tmp_path / "base"), **{"model.quantization": "nf4"})
    merge(run, tmp_path / "out", "float32")
    before, after = (load_file(tmp_path / folder / "model.safetensors") for folder in ("base", "out"))
    prefix = "model.layers.1.block_sparse_moe.experts.2"
    fused, merged = (torch.cat([each[f"{prefix}.w1.weight"], each[f"{prefix}.w3.weight"]]) for each in (before, after))
    assert torch.equal(through_nf4(fused[None], double_quantization=True)[0], merged)


def test_onto_the_original_the_experts_stay_as_they_are(trained_run, tmp_path):
    run = trained_run(TinyModel(model_type="mixtral").write(tmp_path / "base"), **{"model.quantization": "nf4"})
    merge(run, tmp_path / "out", "float32", onto="original")
    before, after = (load_file(tmp_path / folder / "model.safetensors") for folder in ("base", "out"))
    experts = [name for name in before if ".experts." in name]
    assert experts
    assert all(torch.equal(before[name], after[name]) for name in experts)
