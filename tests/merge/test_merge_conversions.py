"""Layers that the base's files have in other tensors than the model: merged in the files' own layout, or said."""

from __future__ import annotations

import pytest
import torch
from matrix.cases import tiny_model
from merge_cases import logits_of, merge, merged_logits, trained_policy
from safetensors.torch import load_file

from qpref.errors import MergeError, RecipeError
from qpref.merging.guards import read_run
from qpref.policy.experts import through_nf4

ONE_STEP = {"train.max_steps": 1, "train.learning_rate": 5e-3, "model.quantization": "nf4"}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """`base(kind)`: the folder of a tiny model, made once."""
    made = {}

    def make(kind):
        if kind not in made:
            made[kind] = tiny_model(kind).write(tmp_path_factory.mktemp(kind))
        return made[kind]

    return make


def test_layers_that_are_one_tensor_in_the_files_are_merged(base, trained_run, tmp_path):
    """Queries, keys and values, of different heights."""
    run = trained_run(base("sarvam_moe"), **ONE_STEP)
    result = merge(run, tmp_path / "out", "float32")
    assert result.verdict.passed
    assert result.kept["float32"] == pytest.approx(1, abs=1e-6)
    assert (merged_logits(tmp_path / "out") - logits_of(trained_policy(run).model)).abs().max() < 1e-4
    before, after = (load_file(folder / "model.safetensors") for folder in (base("sarvam_moe"), tmp_path / "out"))
    assert {name: value.shape for name, value in before.items()} == {name: value.shape for name, value in after.items()}


def test_each_part_of_a_tensor_is_rounded_as_the_model_has_it(base, trained_run):
    """Queries of 64 rows, keys and values of 32 each; double quantization has an offset for each layer."""
    opened = read_run(trained_run(base("sarvam_moe"), **ONE_STEP)).base
    name = next(name for name in opened.tensors if name.endswith("query_key_value.weight"))
    parts = opened.original(name).split([64, 32, 32])
    rounded = torch.cat([through_nf4(part[None], double_quantization=True)[0] for part in parts])
    assert torch.equal(opened.as_trained(name), rounded)


def test_a_layer_of_several_tensors_is_merged_into_them(base, trained_run, tmp_path):
    """The gate and up of MiniMax's shared experts are one layer."""
    run = trained_run(base("minimax_m3_vl"), **ONE_STEP)
    assert merge(run, tmp_path / "out", "float32").verdict.passed
    before, after = (load_file(folder / "model.safetensors") for folder in (base("minimax_m3_vl"), tmp_path / "out"))
    adapter = load_file(run / "adapter/adapter_model.safetensors")
    layer = "model.language_model.layers.0.mlp.shared_experts.gate_up_proj"
    up, down = (adapter[f"base_model.model.{layer}.lora_{which}.weight"] for which in "BA")
    prefix = "language_model.model.layers.0.block_sparse_moe.shared_experts"
    fused, merged = (
        torch.cat([each[f"{prefix}.{name}.weight"] for name in ("gate_proj", "up_proj")]) for each in (before, after)
    )
    assert up.abs().max() > 0
    expected = through_nf4(fused[None], double_quantization=True)[0] + 8 / 4 * up @ down
    assert torch.allclose(merged, expected, atol=1e-6)


def test_requantizing_layers_that_the_files_have_in_other_tensors_is_refused(base, trained_run, tmp_path):
    run = trained_run(base("sarvam_moe"), **ONE_STEP)
    with pytest.raises(RecipeError, match=r"--quantize nf4: .* model.layers.0.self_attn.q_proj in other tensors than"):
        merge(run, tmp_path / "out", quantize="nf4")
    assert not (tmp_path / "out").exists()


def test_an_adapter_on_layers_with_shared_weights_is_said_to_be_for_peft_alone(base, trained_run, tmp_path, said):
    """Zamba's attention blocks have their weights in common, and each has an adapter of its own."""
    run = trained_run(base("zamba"), **ONE_STEP)
    layer = "model.layers.1.shared_transf.self_attn.q_proj"
    sentence = f"14 adapted layers share their weights with other layers, the first is {layer}: qpref merge can't merge"
    assert [line for line in said if line.startswith(sentence)]
    with pytest.raises(
        MergeError, match=r"adapts .*shared_transf.*, which shares its weight with other layers \(14 su"
    ):
        merge(run, tmp_path / "out")
