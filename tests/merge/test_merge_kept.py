"""A merged folder keeps what a run doesn't compute with: foreign tensors to the byte, settings of single layers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from merge_cases import logits_of, merge, merged_logits, trained_policy
from safetensors.torch import load_file
from tiny_models import TinyModel

from qpref.merging.settings import patched_config

FOREIGN = {"extra.weight": (8, 4), "extra.scale": ()}


@pytest.fixture(scope="module")
def numbers(tmp_path_factory) -> Path:
    """Apertus has tensors without dimensions among its own; two more are in the file that transformers doesn't know."""
    return TinyModel(model_type="apertus", foreign=FOREIGN).write(tmp_path_factory.mktemp("apertus"))


@pytest.fixture(scope="module")
def layers(tmp_path_factory) -> Path:
    """Gemma 4's layers have heads of two widths, and a kind of rotary positions that transformers 4.57 doesn't know."""
    config = {"layer_types": ["sliding_attention", "full_attention"], "head_dim": 16, "global_head_dim": 32}
    experts = ("num_experts", "num_experts_per_tok", "moe_intermediate_size")
    return TinyModel(model_type="gemma4_text", config=config, own=experts).write(tmp_path_factory.mktemp("gemma4"))


def test_tensors_without_dimensions_are_merged(trained_run, numbers, tmp_path):
    run = trained_run(numbers, **{"model.quantization": "nf4"})
    merge(run, tmp_path / "out", "float32")
    assert (merged_logits(tmp_path / "out") - logits_of(trained_policy(run).model)).abs().max() < 1e-4


def test_tensors_that_transformers_does_not_know_are_kept_to_the_byte(trained_run, numbers, tmp_path):
    merge(trained_run(numbers, **{"model.quantization": "nf4"}), tmp_path / "out", "bf16")
    before, after = (load_file(folder / "model.safetensors") for folder in (numbers, tmp_path / "out"))
    assert before.keys() == after.keys()
    for name in FOREIGN:
        assert after[name].dtype == torch.float32
        assert torch.equal(before[name], after[name])


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_layers_with_transposed_weights_are_planned_trained_and_merged(trained_run, tmp_path, quantization):
    run = trained_run(TinyModel(model_type="gpt2").write(tmp_path / "base"), **{"model.quantization": quantization})
    merge(run, tmp_path / "out", "float32")
    expected = logits_of(trained_policy(run).model)
    assert (merged_logits(tmp_path / "out") - expected).abs().max() < 1e-4


def test_a_base_with_unknown_tensors_says_so_before_it_is_trained(numbers, said):
    from qpref.policy.pretrained import load_pretrained

    load_pretrained(numbers)
    assert [line for line in said if line.startswith("2 tensors of the base's files") and "extra.scale" in line]


def test_a_model_whose_layers_differ_is_planned_trained_and_merged(trained_run, layers, tmp_path):
    run = trained_run(layers, **{"model.quantization": "nf4"})
    merge(run, tmp_path / "out", "float32")
    assert (merged_logits(tmp_path / "out") - logits_of(trained_policy(run).model)).abs().max() < 1e-4


def test_older_keys_are_left_out_where_transformers_would_read_other_settings(layers):
    base = json.loads((layers / "config.json").read_text())
    assert patched_config(base, torch.float32) == base | {"torch_dtype": "float32"}
