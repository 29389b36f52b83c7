"""Fused experts in 4 bits: exact against dense experts, nothing dense kept, packed while they are loaded, and said."""

from __future__ import annotations

import logging
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from expert_cases import KINDS, TOKENS, dense
from tiny_models import TinyModel
from torch import Tensor
from transformers import AutoModelForCausalLM

from qpref.policy import experts, nf4_loading
from qpref.policy.experts import PackedExperts, packed_names, through_nf4
from qpref.policy.experts_forward import compute_experts
from qpref.policy.load import load_base, load_plain
from qpref.policy.nf4_loading import nf4_settings
from qpref.policy.source import resolve_base
from qpref.recipe.sections import ModelSection


def section(base: Path, **changes: Any) -> ModelSection:
    return ModelSection(**{"base": str(base), "dtype": "float32", "device": "cpu"} | changes)


def load(base: Path, **changes: Any) -> Any:
    settings = section(base, **changes)
    return load_base(settings, resolve_base(settings), torch.device("cpu")).eval()


def values_and_gradients(model: Any) -> tuple[Tensor, Tensor]:
    inputs = model.get_input_embeddings().weight[TOKENS].clone().requires_grad_()
    logits = model(inputs_embeds=inputs, use_cache=False).logits
    logits.log_softmax(-1)[..., 3].sum().backward()
    return logits.detach(), inputs.grad


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("double_quantization", [True, False])
def test_values_and_gradients_are_those_of_dense_experts(kind, double_quantization, tmp_path):
    base = KINDS[kind].write(tmp_path)
    packed = load(base, double_quantization=double_quantization)
    assert packed_names(packed)
    for ours, theirs in zip(
        values_and_gradients(packed), values_and_gradients(dense(base, packed, double_quantization)), strict=True
    ):
        assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()


def test_scales_kept_in_8_bits_are_those_of_a_cpu(monkeypatch):
    """A GPU keeps double quantization's 8-bit scales; a CPU unpacks them when a model is loaded."""
    torch.manual_seed(0)
    weights = torch.randn(3, 48, 100)  # 75 blocks an expert, no whole block of scales
    unpacked = PackedExperts(weights, double_quantization=True)
    monkeypatch.setattr(experts, "keeps_scales", lambda device: True)
    kept = PackedExperts(weights, double_quantization=True)
    assert kept.scales.dtype == torch.uint8
    assert unpacked.scales.dtype == torch.float32
    assert unpacked.scales.shape == (3, 75)
    rounded = through_nf4(weights, double_quantization=True)
    for each in (unpacked, kept):
        found = dict(each.dense([2, 0, 1]))
        assert found.keys() == {0, 2}
        assert all(torch.equal(found[expert], rounded[expert]) for expert in found)


def test_nothing_dense_is_kept_for_the_backward_pass(tmp_path):
    packed = load(KINDS["mixtral"].write(tmp_path))
    sizes: list[int] = []
    smallest = min(each.num_weights // each.num_experts for each in packed.modules() if isinstance(each, PackedExperts))

    def keep(tensor: Tensor) -> Tensor:
        sizes.append(tensor.numel())
        return tensor

    x = torch.randn(2, 64, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        packed.model.layers[0].mlp.experts(x, torch.tensor([[0, 1], [0, 3]]), torch.rand(2, 2)).sum().backward()
    assert max(sizes) < smallest
    assert x.grad is not None


def test_a_number_beyond_the_last_expert_adds_nothing():
    torch.manual_seed(0)
    module = SimpleNamespace(has_gate=False, has_bias=False, is_transposed=False, act_fn=torch.relu)
    module.up_proj = PackedExperts(torch.randn(2, 32, 64), double_quantization=False)
    module.down_proj = PackedExperts(torch.randn(2, 64, 32), double_quantization=False)
    x, weights = torch.randn(3, 64), torch.rand(3, 2)
    one = compute_experts(module, x, torch.tensor([[0, 2], [2, 1], [2, 2]]), weights)
    weights[0, 1] = weights[1, 0] = 0
    two = compute_experts(module, x[:2], torch.tensor([[0, 1], [0, 1]]), weights[:2])
    assert torch.allclose(one[:2], two, atol=1e-6)
    assert not one[2].any()


def test_one_projection_of_one_layer_at_most_is_whole_in_memory_while_a_model_loads(tmp_path, monkeypatch):
    """What is packed by then is packed: of the parameters before it, none is left in 16 or 32 bits."""
    base = KINDS["qwen3_moe"].write(tmp_path)
    alive: list[int] = []
    seen: list[Any] = []

    def packing(weights: Tensor, double_quantization: bool) -> PackedExperts:
        alive.append(sum(each() is not None for each in seen))
        seen.append(weakref.ref(weights.untyped_storage()))
        return PackedExperts(weights, double_quantization)

    monkeypatch.setattr(nf4_loading, "PackedExperts", packing)
    model = AutoModelForCausalLM.from_pretrained(
        base, dtype=torch.float32, quantization_config=nf4_settings(torch.float32, True), device_map={"": "cpu"}
    )
    assert len(alive) == len(packed_names(model)) == 4
    assert max(alive) <= 1


@pytest.mark.parametrize(
    ("kind", "quantization", "sentence"),
    [
        ("qwen3_moe", "nf4", "experts: 49,152 weights are frozen in 4 bits (NF4) and get no adapter"),
        ("qwen3_moe", "none", "experts: 49,152 weights are frozen in 32 bits and get no adapter"),
        ("jetmoe", "nf4", "experts: 229,376 weights are frozen in 32 bits and get no adapter"),
    ],
)
def test_how_experts_are_kept_is_said(kind, quantization, sentence, said, tmp_path, caplog):
    caplog.set_level("INFO", "qpref")
    settings = section(TinyModel(model_type=kind).write(tmp_path), quantization=quantization)
    load_plain(settings, resolve_base(settings))
    assert [line for line in caplog.messages if line.startswith("experts: ")] == [sentence]


def test_a_model_without_experts_says_nothing(caplog, make_base):
    caplog.set_level(logging.INFO, "qpref")
    settings = section(make_base())
    load_plain(settings, resolve_base(settings))
    assert not [line for line in caplog.messages if "expert" in line]
