"""Layers that "all-linear" takes: what computes a linear layer, and what PEFT adapts in such a model."""

from __future__ import annotations

import pytest
import torch
from matrix.cases import tiny_model
from tiny_models import TinyModel
from torch import nn

from qpref.errors import PolicyError
from qpref.policy.architecture import layers_after_decoder
from qpref.policy.experts_lora import adaptable_experts
from qpref.policy.targets import is_linear, peft_target_modules, target_layers


def endings(model, targets="all-linear") -> set[str]:
    return {name.rpartition(".")[2] for name in target_layers(model, targets)}


@pytest.mark.parametrize("family", ["phimoe", "llama4_text"])
def test_a_router_that_returns_several_tensors_is_no_linear_layer(family):
    assert not {"router", "gate"} & endings(TinyModel(model_type=family).make())


def test_dense_layers_under_names_that_mean_experts_to_peft_are_left_out(said):
    model = TinyModel(model_type="dots1").make()
    assert endings(model) == {"q_proj", "k_proj", "v_proj", "o_proj"}
    assert "PEFT can't adapt layers of the names down_proj, gate_proj, up_proj in a dots1 model" in "".join(said)


def test_a_router_whose_name_means_its_weight_to_peft_is_left_out():
    assert "gate" not in endings(TinyModel(model_type="afmoe").make())


def test_layers_that_peft_cannot_adapt_are_refused_with_those_that_it_can():
    model = TinyModel(model_type="dots1").make()
    with pytest.raises(PolicyError, match=r"names down_proj in a dots1 model; it can adapt k_proj, lm_head, o_proj, q"):
        target_layers(model, ["q_proj", "down_proj"])


def test_layers_that_peft_would_load_under_other_names_are_left_out(said):
    model = TinyModel(model_type="laguna").make()
    found = target_layers(model, "all-linear")
    assert "model.layers.0.mlp.gate_proj" in found
    assert not any("shared_experts" in name for name in found)
    names = "shared_experts.down_proj, shared_experts.gate_proj, shared_experts.up_proj"
    assert f"PEFT would load adapters on {names} under other names in a laguna model; they stay as they are" in said


def test_layers_that_peft_would_load_under_other_names_are_refused_where_they_are_named():
    model = TinyModel(model_type="laguna").make()
    with pytest.raises(PolicyError, match=r"targets: PEFT would load adapters on shared_experts.up_proj under other n"):
        target_layers(model, ["q_proj", "up_proj"])
    assert target_layers(model, ["layers.0.mlp.up_proj"]) == {"model.layers.0.mlp.up_proj"}


def test_experts_that_peft_would_load_under_other_names_are_refused():
    assert len(adaptable_experts(TinyModel(model_type="laguna").make())) == 2
    with pytest.raises(PolicyError, match=r"experts: PEFT would load adapters on mlp.experts under other names in a m"):
        adaptable_experts(tiny_model("mistral_large4").make())


def test_the_output_of_a_state_space_layer_is_left_out_where_peft_refuses_it():
    found = endings(TinyModel(model_type="falcon_h1").make())
    assert "out_proj" not in found
    assert "in_proj" in found


def test_an_unknown_target_is_answered_with_layers_of_this_model():
    with pytest.raises(PolicyError, match="'q_proj' names no linear layer; it has kv_a_proj_with_mqa, kv_b_proj, lm_h"):
        target_layers(TinyModel(model_type="deepseek_v2").make(), ["q_proj"])


def test_an_index_of_a_list_is_no_name():
    model = TinyModel(model_type="gemma3n_text").make()
    assert not any(name.isdigit() for name in peft_target_modules(model, target_layers(model, "all-linear")))


def test_a_layer_with_a_forward_pass_of_its_own_is_linear_where_it_computes_the_same():
    from transformers.models.falcon.modeling_falcon import FalconLinear

    class Grouped(nn.Linear):
        """Two groups, each with half of the input."""

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            halves = zip(x.chunk(2, -1), self.weight.chunk(2), strict=True)
            return torch.cat([half @ weight.t() for half, weight in halves], -1)

    assert is_linear(FalconLinear(8, 4, bias=True))
    assert not is_linear(Grouped(8, 4))


def test_layers_between_decoder_and_head_are_named():
    assert layers_after_decoder(TinyModel(model_type="modernbert-decoder").make()) == ["lm_head"]
    assert not layers_after_decoder(TinyModel(model_type="llama").make())
