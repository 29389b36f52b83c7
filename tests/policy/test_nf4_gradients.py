"""Gradients through 4-bit layers are those of the same weights held dense, whatever ran before.

bitsandbytes 0.50.2 repacks a Linear4bit's weight in place at its first forward pass in eval mode on a CPU with
AVX512-BF16. From then on the product has no backward pass, and LoRA's gradients are wrong with no more than a warning.
"""

from __future__ import annotations

from array import array

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit
from conftest import load_worn
from peft.tuners.lora.bnb import Linear4bit as PeftLinear4bit
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from qpref.data.pack import pack
from qpref.policy.logprobs import completion_logprobs
from qpref.policy.lora import FusedLinear4bit
from qpref.policy.policy import Policy
from qpref.policy.reference import as_reference
from qpref.records import Source, TokenizedExample

# Two layers, each with q, k, v, o, gate, up and down.
NUM_LINEAR = 14
# Packed in 64s: every weight of the tiny model has a multiple of 64 entries and so whole blocks.
TOLERANCES = {"float32": 1e-5, "bf16": 2**-8}


@pytest.fixture
def load(make_base, make_recipe):
    """`load({"model.dtype": "bf16"})`: a policy with an adapter that is not fresh; NF4 unless asked otherwise."""
    base = make_base(initializer_range=0.2)

    def load(changes: dict[str, object]) -> Policy:
        return load_worn(make_recipe({"model.base": str(base), "model.quantization": "nf4"} | changes))

    return load


def test_weights_are_those_of_packed_scales(load):
    """They are unpacked once and for all; no bit of a weight changes."""
    policy = load({"model.double_quantization": True})
    packed = AutoModelForCausalLM.from_pretrained(
        policy.model.get_base_model().config._name_or_path,
        quantization_config=BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.float32,
        ),
        dtype=torch.float32,
        device_map={"": "cpu"},
    )
    names = policy.quantized_modules()
    assert len(names) == NUM_LINEAR
    for name in names:
        ours, theirs = policy.model.get_base_model().get_submodule(name), packed.get_submodule(name)
        weight, wanted = ours.base_layer.weight, theirs.weight
        assert not weight.quant_state.nested
        assert wanted.quant_state.nested
        found = dequantize_4bit(weight, weight.quant_state)
        assert torch.equal(found, dequantize_4bit(wanted, wanted.quant_state))


@pytest.fixture
def batch():
    source = Source(path="made", line=1)
    example = TokenizedExample(
        prompt=array("i", list(b"What comes after 3?")),
        branches=(array("i", list(b"4 comes after 3.")), array("i", list(b"WHO KNOWS"))),
        truncated=(False, False),
        weight=1.0,
        margin=0.0,
        source=source,
    )
    return pack([example], torch.device("cpu"))


def dense_oracle(load, policy: Policy, dtype: str) -> Policy:
    """An unquantized policy that holds the 4-bit one's dequantized weights and its adapters."""
    dense = load({"model.quantization": "none", "model.dtype": dtype})
    base, quantized = dense.model.get_base_model(), policy.model.get_base_model()
    for name in policy.quantized_modules():
        weight = quantized.get_submodule(name).base_layer.weight
        base.get_submodule(name).base_layer.weight.copy_(dequantize_4bit(weight.data, weight.quant_state))
    return dense


def gradients(policy: Policy, batch) -> dict[str, torch.Tensor]:
    """Of chosen less rejected, the direction in which every paired loss pulls."""
    policy.model.zero_grad(set_to_none=True)
    chosen, rejected = completion_logprobs(policy, batch).total
    (chosen - rejected).backward()
    return {name: parameter.grad for name, parameter in policy.trained_parameters().items()}


def worst(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> float:
    """The largest error of any entry, as a share of its tensor's largest entry."""
    assert found.keys() == wanted.keys()
    return max(((found[name] - value).abs().max() / value.abs().max()).item() for name, value in wanted.items())


def four_bit_layers(policy: Policy) -> list[Linear4bit]:
    return [module for module in policy.model.modules() if isinstance(module, Linear4bit)]


def num_repacked(policy: Policy) -> int:
    return sum(
        bool(getattr(layer.weight.quant_state, "packing_format_for_cpu", False)) for layer in four_bit_layers(policy)
    )


@pytest.mark.parametrize("double", [True, False], ids=["double", "single"])
@pytest.mark.parametrize("dtype", TOLERANCES)
def test_gradients_are_those_of_dense_weights(dtype, double, load, batch):
    policy = load({"model.dtype": dtype, "model.double_quantization": double})
    wanted = gradients(dense_oracle(load, policy, dtype), batch)
    assert worst(gradients(policy, batch), wanted) <= TOLERANCES[dtype]


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "checkpointed"])
@pytest.mark.parametrize("dtype", TOLERANCES)
def test_gradients_are_those_of_dense_weights_after_a_reference_pass(dtype, checkpointing, load, batch):
    policy = load({"model.dtype": dtype, "train.gradient_checkpointing": checkpointing})
    wanted = gradients(dense_oracle(load, policy, dtype), batch)
    with as_reference(policy):
        completion_logprobs(policy, batch)
    assert worst(gradients(policy, batch), wanted) <= TOLERANCES[dtype]


@pytest.mark.parametrize("dtype", TOLERANCES)
def test_a_reference_pass_between_forward_and_backward_changes_no_gradient(dtype, load, batch):
    policy = load({"model.dtype": dtype})
    wanted = gradients(policy, batch)
    policy.model.zero_grad(set_to_none=True)
    chosen, rejected = completion_logprobs(policy, batch).total
    with as_reference(policy):
        completion_logprobs(policy, batch)
    (chosen - rejected).backward()
    for name, parameter in policy.trained_parameters().items():
        assert torch.equal(parameter.grad, wanted[name]), name


@pytest.mark.parametrize("dtype", TOLERANCES)
def test_no_weight_is_repacked_by_a_reference_pass(dtype, load, batch):
    policy = load({"model.dtype": dtype})
    before = [layer.weight.data.clone() for layer in four_bit_layers(policy)]
    with as_reference(policy):
        completion_logprobs(policy, batch)
    assert num_repacked(policy) == 0
    assert all(
        torch.equal(*pair) for pair in zip(before, (x.weight.data for x in four_bit_layers(policy)), strict=True)
    )


def open_trap(policy: Policy) -> None:
    """Let bitsandbytes repack weights, as it does by itself on a CPU with AVX512-BF16."""
    for layer in four_bit_layers(policy):
        layer.support_avx512bf16_for_cpu = True


def adapt_as_peft_does(policy: Policy) -> None:
    """PEFT's layers call that of bitsandbytes, whose forward pass has the trap; ours multiply by themselves."""
    for module in policy.model.modules():
        if isinstance(module, FusedLinear4bit):
            module.__class__ = PeftLinear4bit


def test_no_layer_is_allowed_to_repack(load):
    layers = [module for module in load({}).model.modules() if isinstance(module, Linear4bit)]
    assert [layer.support_avx512bf16_for_cpu for layer in layers] == [False] * NUM_LINEAR


def test_nothing_but_the_adapter_is_float32_on_a_bf16_base(load):
    # Norms that are prepared in float32 would be trained with, and merged in 16 bits.
    parameters = load({"model.dtype": "bf16"}).model.named_parameters()
    assert {value.dtype for name, value in parameters if "lora_" not in name} == {torch.bfloat16, torch.uint8}


def test_our_layers_dont_step_into_the_open_trap(load, batch, monkeypatch):
    policy = load({})
    wanted = gradients(policy, batch)
    open_trap(policy)
    # The trap is in bitsandbytes' forward pass, on CPUs of every kind: it decides there whether to repack.
    calls = []
    monkeypatch.setattr(Linear4bit, "forward", lambda *call: calls.append(call))
    with as_reference(policy):
        completion_logprobs(policy, batch)
    assert calls == []
    monkeypatch.undo()
    assert num_repacked(policy) == 0
    assert worst(gradients(policy, batch), wanted) == 0.0


def test_with_the_trap_open_every_layer_is_repacked(load, batch):
    policy = load({})
    adapt_as_peft_does(policy)
    open_trap(policy)
    with as_reference(policy):
        completion_logprobs(policy, batch)
    assert num_repacked(policy) == NUM_LINEAR


@pytest.mark.filterwarnings("ignore:bitsandbytes..gemv_4bit. an autograd kernel was not registered")
def test_with_the_trap_open_gradients_are_wrong(load, batch):
    policy = load({})
    adapt_as_peft_does(policy)
    wanted = gradients(policy, batch)
    open_trap(policy)
    with as_reference(policy):
        completion_logprobs(policy, batch)
    assert worst(gradients(policy, batch), wanted) > 0.5


def test_every_linear_layer_of_the_blocks_is_four_bit(load):
    policy = load({})
    assert len(policy.quantized_modules()) == NUM_LINEAR
    assert {layer.weight.quant_state.quant_type for layer in four_bit_layers(policy)} == {"nf4"}
    assert {layer.weight.quant_state.blocksize for layer in four_bit_layers(policy)} == {64}
