"""LoRA on fused experts: exact by PEFT's own computation on dense weights, saved in PEFT's format, refused in words."""

from __future__ import annotations

import json
import logging
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import load_worn, make_example
from expert_cases import KINDS, TOKENS, dense
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tiny_models import TinyModel
from torch import Tensor
from transformers import AutoModelForCausalLM

from qpref.data.pack import pack
from qpref.errors import PolicyError
from qpref.policy.experts_lora import peft_target_parameters
from qpref.policy.load import load_policy
from qpref.policy.logprobs import completion_logprobs
from qpref.policy.policy import Policy
from qpref.policy.reference import as_reference
from qpref.policy.source import resolve_base
from qpref.recipe.sections import Recipe
from qpref.training.gradient_check import check_gradients

CPU = torch.device("cpu")
EXAMPLE = make_example(1, 9, 12, 7)


def load(base: Path, quantization: str = "nf4", dtype: str = "float32", **adapter: Any) -> Policy:
    """A policy with adapters on experts whose B are random, in eval mode."""
    model = {"base": str(base), "quantization": quantization, "dtype": dtype, "device": "cpu"}
    policy = load_worn({"model": model, "adapter": {"rank": 3, "alpha": 5.0, "experts": True} | adapter})
    policy.share_prompts(False)
    policy.model.eval()
    return policy


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory) -> Path:
    return KINDS["mixtral"].write(tmp_path_factory.mktemp("mixtral"))


@pytest.fixture
def saved(mixtral, tmp_path) -> Path:
    load(mixtral).model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def values_and_gradients(model: Any) -> tuple[Tensor, dict[str, Tensor]]:
    logits = model(input_ids=TOKENS, use_cache=False).logits
    logits.log_softmax(-1)[..., 3].sum().backward()
    return logits.detach(), {name: value.grad for name, value in model.named_parameters() if value.grad is not None}


@pytest.mark.parametrize(
    ("kind", "quantization"), [*((kind, "nf4") for kind in KINDS), ("mixtral", "none"), ("gpt_oss", "none")]
)
def test_values_and_gradients_are_those_of_peft_on_dense_weights(kind, quantization, tmp_path):
    base = KINDS[kind].write(tmp_path / "base")
    policy = load(base, quantization, rslora=kind == "olmoe")
    policy.model.save_pretrained(tmp_path / "adapter")
    plain = dense(base, policy.model, double_quantization=True)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*(missing|unexpected|not found).*")
        by_peft = PeftModel.from_pretrained(plain, tmp_path / "adapter", is_trainable=True).eval()
    (logits, gradients), (expected, wanted) = (values_and_gradients(each) for each in (policy.model, by_peft))
    assert (logits - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert gradients.keys() == wanted.keys() == policy.trained_parameters().keys()
    assert any(".experts.base_layer.lora_A." in name for name in gradients)
    for name, gradient in gradients.items():
        assert (gradient - wanted[name]).abs().max() <= 1e-5 * wanted[name].abs().max(), name
    with policy.model.disable_adapter(), by_peft.disable_adapter(), torch.no_grad():
        without, plain_logits = (each(input_ids=TOKENS, use_cache=False).logits for each in (policy.model, by_peft))
    assert (without - plain_logits).abs().max() <= 1e-5 * plain_logits.abs().max()
    assert (without - logits).abs().max() > 0.1


@pytest.mark.parametrize("dtype", ["float32", "bf16"])
def test_the_reference_is_the_policy_without_expert_adapters_to_the_bit(mixtral, dtype):
    batch = pack([EXAMPLE], CPU)
    adapted, plain = (load(mixtral, dtype=dtype, experts=experts) for experts in (True, False))
    with as_reference(adapted), as_reference(plain):
        assert torch.equal(*(completion_logprobs(policy, batch).values for policy in (adapted, plain)))


@pytest.mark.parametrize("quantization", ["nf4", "none"])
def test_a_fresh_adapter_changes_nothing_to_the_bit(mixtral, quantization):
    policy, batch = load(mixtral, quantization, dtype="bf16"), pack([EXAMPLE], CPU)
    for name, value in policy.trained_parameters().items():
        if "lora_B" in name:
            value.data.zero_()
    with as_reference(policy):
        reference = completion_logprobs(policy, batch).values
    assert torch.equal(completion_logprobs(policy, batch).values, reference)


def test_adapters_of_experts_are_float32_and_nothing_else_is_trained(mixtral):
    policy = load(mixtral, dtype="bf16")
    assert {value.dtype for value in policy.trained_parameters().values()} == {torch.float32}
    trained = {name for name, value in policy.model.named_parameters() if value.requires_grad}
    assert trained == policy.trained_parameters().keys()
    assert sum(".experts." in name for name in trained) == 2 * 2 * 2  # layers, projections, A and B


def test_a_bf16_gradient_is_near_that_of_float32(mixtral):
    found = []
    for dtype in ("bf16", "float32"):
        policy = load(mixtral, dtype=dtype)
        completion_logprobs(policy, pack([EXAMPLE], CPU)).values.sum().backward()
        found.append({name: value.grad for name, value in policy.trained_parameters().items() if ".experts." in name})
    for name, exact in found[1].items():
        assert (found[0][name] - exact).norm() < 0.3 * exact.norm(), name


def test_an_expert_without_tokens_has_a_gradient_of_zero(mixtral):
    policy = load(mixtral)
    policy.model(input_ids=TOKENS[:1, :1], use_cache=False).logits.log_softmax(-1)[..., 3].sum().backward()
    (gradient, *_) = (value.grad for name, value in policy.trained_parameters().items() if ".experts.lora_A." in name)
    by_expert = gradient.view(4, 3, -1).abs().amax((1, 2))
    assert (by_expert > 0).sum() == 2  # one token's


@pytest.mark.parametrize("name", ["experts", "experts.base_layer"])
def test_experts_without_a_gradient_are_named(mixtral, name):
    policy = load(mixtral)
    completion_logprobs(policy, pack([EXAMPLE], CPU)).values.sum().backward()
    check_gradients(policy, EXAMPLE)
    layer = f"model.layers.1.mlp.{name}"
    policy.trained_parameters()[f"base_model.model.{layer}.lora_B.default.weight"].grad = None
    with pytest.raises(PolicyError, match=f"1 of 12 adapted layers get no gradient, the first is {layer}\n"):
        check_gradients(policy, EXAMPLE)


# In PEFT's format.


def test_the_settings_name_the_parameters_for_peft(saved):
    settings = json.loads((saved / "adapter_config.json").read_text())
    assert settings["target_parameters"] == ["experts.down_proj", "experts.gate_up_proj"]
    assert sorted(settings["target_modules"]) == ["k_proj", "o_proj", "q_proj", "v_proj"]


def test_parameters_whose_ending_means_others_too_are_named_in_full():
    model = KINDS["qwen3_moe"].make()
    names = ["model.layers.0.mlp.experts.gate_up_proj", "model.layers.0.mlp.experts.down_proj"]
    assert peft_target_parameters(model, names) == sorted(names)
    others = [name.replace(".0.", ".1.") for name in names]
    assert peft_target_parameters(model, names + others) == ["experts.down_proj", "experts.gate_up_proj"]


def test_an_adapter_is_continued_and_its_copy_is_the_reference(mixtral, saved):
    first, batch = load(mixtral), pack([EXAMPLE], CPU)
    policy = continued(mixtral, start=str(saved))
    trained = policy.trained_parameters()
    assert trained.keys() == first.trained_parameters().keys()
    assert all(torch.equal(value, first.trained_parameters()[name]) for name, value in trained.items())
    scores = completion_logprobs(policy, batch).values
    assert torch.equal(scores, completion_logprobs(first, batch).values)
    for value in trained.values():
        value.data += 0.1
    with as_reference(policy):
        assert torch.equal(completion_logprobs(policy, batch).values, scores)
    assert not torch.equal(completion_logprobs(policy, batch).values, scores)


@pytest.mark.filterwarnings("ignore:The following .*_pattern keys did not match")  # PEFT looks among modules alone
def test_pefts_own_adapter_on_one_projection_is_continued(mixtral, tmp_path):
    """With a rank and a factor of its own."""
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_pretrained(mixtral, dtype=torch.float32)
    config = LoraConfig(
        r=2,
        lora_alpha=3,
        init_lora_weights=False,
        target_modules=["q_proj"],
        target_parameters=["mlp.experts.gate_up_proj"],
        rank_pattern={r".*\.gate_up_proj": 4},
        alpha_pattern={r".*\.gate_up_proj": 10},
    )
    by_peft = get_peft_model(model, config).eval()
    by_peft.save_pretrained(tmp_path / "adapter")
    policy = continued(mixtral, quantization="none", start=str(tmp_path / "adapter"), experts=True)
    with torch.no_grad():
        found, expected = (each(input_ids=TOKENS, use_cache=False).logits for each in (policy.model, by_peft))
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


def continued(base: Path, quantization: str = "nf4", **adapter: Any) -> Policy:
    model = {"base": str(base), "quantization": quantization, "dtype": "float32", "device": "cpu"}
    values = {"model": model, "adapter": adapter, "data": {"train": "none"}, "loss": {"name": "none"}}
    recipe = Recipe.model_validate(values)
    policy = load_policy(recipe, resolve_base(recipe.model))
    policy.share_prompts(False)
    policy.model.eval()
    return policy


# Refused in a sentence.


@pytest.mark.parametrize(
    ("kind", "problem"),
    [
        ("llama", "this llama model has no experts"),
        (
            "llama4_text",
            "the experts of this llama4_text model aren't computed by transformers' common expert functions",
        ),
    ],
)
def test_a_model_whose_experts_cannot_be_adapted_is_refused(kind, problem, tmp_path):
    with pytest.raises(PolicyError) as caught:
        load(TinyModel(model_type=kind).write(tmp_path))
    assert (caught.value.what, caught.value.hint) == (f"[adapter] experts: {problem}", "leave [adapter] experts out")


def test_a_start_adapter_with_experts_has_no_dropout(mixtral, saved):
    with pytest.raises(PolicyError, match=r"\[adapter\] dropout: .* is on experts, where PEFT has no dropout"):
        continued(mixtral, start=str(saved), dropout=0.1)


def test_a_start_adapter_without_experts_gets_none(mixtral, tmp_path):
    load(mixtral, experts=False).model.save_pretrained(tmp_path / "start")
    with pytest.raises(PolicyError, match=r"\[adapter\] experts: .*start has no adapter on experts, and a start"):
        continued(mixtral, start=str(tmp_path / "start"), experts=True)


def test_a_start_adapter_on_other_parameters_is_refused(mixtral, saved, tmp_path):
    shutil.copytree(saved, tmp_path / "other")
    path = tmp_path / "other/adapter_config.json"
    path.write_text(path.read_text().replace("experts.down_proj", "gate.weight"))
    with pytest.raises(PolicyError, match=r"other: the adapter's target parameter gate.weight is no projection of"):
        continued(mixtral, start=str(tmp_path / "other"))


def test_a_start_adapter_of_another_number_of_experts_is_refused(mixtral, saved, tmp_path):
    shutil.copytree(saved, tmp_path / "other")
    path = tmp_path / "other/adapter_model.safetensors"
    tensors = load_file(path)
    name = "base_model.model.model.layers.0.mlp.experts.lora_A.weight"
    save_file(tensors | {name: tensors[name][:6].clone()}, path)
    with pytest.raises(PolicyError, match=rf"{name} is \(6, 128\), the base needs \(12, 128\)"):
        continued(mixtral, start=str(tmp_path / "other"))


def test_that_experts_are_adapted_is_said(mixtral, caplog):
    caplog.set_level(logging.INFO, "qpref")
    load(mixtral)
    assert "experts: 196,608 weights are frozen in 4 bits (NF4) with an adapter" in caplog.messages
