"""A policy with fused layers is the same policy: scores, gradients and names, in every family, and where a family's own
formula is another one its layers stay."""

from __future__ import annotations

import json

import pytest
import torch
from fused_cases import (
    FAMILIES,
    apart,
    furthest,
    load_family,
    make_batch,
    make_family,
    num_fused,
    outcome,
    squared_errors,
    unfused,
)
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from qpref.policy.float32 import compute_in_float32
from qpref.policy.gated_mlp import GatedMLP
from qpref.policy.logprobs import completion_logprobs
from qpref.policy.norms import FORMULAS, RMSNorm
from qpref.policy.reference import as_reference
from qpref.policy.self_attention import SelfAttention

__all__ = ["make_family"]

LLAMA, GEMMA, OLMO2 = FORMULAS

# Attention layers, MLPs and norms of two layers that are fused, and the norms' formula.
FUSED = {
    "llama": (2, 2, 5, LLAMA),
    "qwen2": (2, 2, 5, LLAMA),
    "qwen3": (2, 2, 9, LLAMA),
    "mistral": (2, 2, 5, LLAMA),
    "gemma2": (2, 2, 9, GEMMA),
    "gemma3": (2, 2, 13, GEMMA),
    "granite": (2, 2, 5, LLAMA),
    "smollm3": (1, 2, 5, LLAMA),  # one layer has no positions
    "olmo": (2, 2, 0, None),  # LayerNorm
    "olmo, clipped": (0, 2, 0, None),
    "olmo2": (0, 2, 9, OLMO2),  # it norms all queries as one
    "cohere": (0, 2, 0, None),  # interleaved positions
    "phi3": (0, 0, 5, LLAMA),  # one layer for queries, keys and values, one for gate and up
    "glm4_moe": (2, 2, 5, LLAMA),  # half of a head has positions: fused, and its own when called
    "mixtral": (2, 0, 5, LLAMA),
    "qwen3_moe": (2, 0, 9, LLAMA),
    "gpt_oss": (0, 0, 5, LLAMA),  # sinks
    "nanochat": (0, 0, 0, None),  # norms without a weight
    "gemma3n": (0, 1, 20, OLMO2),  # one MLP is sparse
}


@pytest.mark.parametrize("family", FAMILIES)
def test_scores_and_gradients_are_those_of_the_familys_own_layers(family, make_family):
    base, batch = make_family(family), make_batch()
    policy = load_family(base, family)
    with unfused():
        plain = load_family(base, family)
    assert (num_fused(policy), num_fused(plain)) == (FUSED[family][:3], (0, 0, 0))
    wanted = outcome(plain, batch)
    assert furthest(outcome(policy, batch), wanted) <= 1e-5
    policy.share_prompts(False)
    plain.share_prompts(False)
    assert furthest(outcome(policy, batch), outcome(plain, batch)) <= 1e-5


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "gemma3", "granite", "smollm3", "olmo", "olmo2"])
def test_in_bf16_they_are_as_near_to_float32s(family, make_family):
    base, batches = make_family(family), [make_batch(seed) for seed in range(6)]
    policy = load_family(base, family, "bf16")
    with unfused():
        plain, exact = (load_family(base, family, dtype) for dtype in ("bf16", "float32"))
    for tensor in exact.model.parameters():  # the same weights, rounded
        if not tensor.requires_grad:
            tensor.data = tensor.data.bfloat16().float()
    wanted = [outcome(exact, batch) for batch in batches]
    ours, theirs = (
        sum(squared_errors(outcome(each, batch), right) for batch, right in zip(batches, wanted, strict=True))
        for each in (policy, plain)
    )
    assert ((ours / theirs).sqrt() <= 1.2).all(), (ours, theirs)
    assert num_fused(policy) == FUSED[family][:3]
    formulas = {module.formula for module in policy.decoder.modules() if type(module) is RMSNorm}
    assert formulas == ({FUSED[family][3]} - {None})


@pytest.mark.parametrize("family", ["qwen2", "gemma3"])
@pytest.mark.parametrize("quantization", ["none", "nf4"])
@pytest.mark.parametrize(
    "targets",
    ["all-linear", ["q_proj", "v_proj"], ["k_proj", "down_proj"], ["o_proj"]],
    ids=lambda each: "+".join(each),
)
def test_any_targets_dense_or_4_bit_have_the_same_gradients(family, quantization, targets, make_family):
    base, batch, changes = make_family(family), make_batch(), {"quantization": quantization, "targets": targets}
    policy = load_family(base, family, **changes)
    with unfused():
        plain = load_family(base, family, **changes)
    assert num_fused(policy) == FUSED[family][:3]
    assert furthest(outcome(policy, batch), outcome(plain, batch)) <= 1e-5


@pytest.mark.parametrize("family", ["qwen3", "gemma3"])
def test_recomputed_layers_have_the_same_gradients_under_dropout(family, make_family):
    base, found = make_family(family), []
    for recomputed in (False, True):
        policy = load_family(base, family, recomputed=recomputed, dropout=0.3)
        policy.seed_dropout(3, 0)
        found.append(outcome(policy, make_batch()))
        policy.seed_dropout(4, 0)
        assert furthest(outcome(policy, make_batch()), found[0]) > 0.01
    assert policy.recomputed_layers == 2
    assert furthest(*found) == 0


def test_gradients_under_dropout_are_those_of_finite_differences(make_family):
    policy, batch, step = load_family(make_family("qwen3"), "qwen3", dropout=0.3), make_batch(), 1e-3
    found = outcome(policy, batch)
    trained = policy.trained_parameters()
    directions = {name: found[name] / found[name].norm() for name in trained}
    slope = sum((found[name] * directions[name]).sum() for name in trained)
    sums = []
    for sign in (1, -1):
        for name, tensor in trained.items():
            tensor.data.add_(directions[name], alpha=sign * step)
        totals = completion_logprobs(policy, batch).total.detach().double()
        sums.append((totals * torch.tensor([1.0, -1.0]).repeat(len(batch.examples))).sum())
        for name, tensor in trained.items():
            tensor.data.sub_(directions[name], alpha=sign * step)
    assert (sums[0] - sums[1]) / (2 * step) == pytest.approx(slope.item(), rel=0.01)


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_the_reference_is_the_base(quantization, make_family):
    base, batch = make_family("qwen3"), make_batch()
    policy = load_family(base, "qwen3", quantization=quantization)
    with unfused():
        plain = load_family(base, "qwen3", quantization=quantization)
    before = completion_logprobs(policy, batch).values.detach()
    with as_reference(policy), as_reference(plain):
        found, wanted = (completion_logprobs(each, batch).values for each in (policy, plain))
    assert apart(found, wanted) <= 1e-5 < apart(before, wanted)
    assert torch.equal(completion_logprobs(policy, batch).values, before)


def test_gradients_pass_through_a_base_whose_adapters_are_off(make_family):
    """To a prompt's embeddings, say."""
    base, found = make_family("qwen3"), []
    with unfused():
        plain = load_family(base, "qwen3")
    for policy in (load_family(base, "qwen3"), plain):
        policy.model.base_model.disable_adapter_layers()
        weight = policy.decoder.embed_tokens.weight.requires_grad_()
        completion_logprobs(policy, make_batch()).total.sum().backward()
        found.append(weight.grad)
    assert apart(*found) <= 1e-5


def test_a_start_adapter_is_the_reference(make_family, tmp_path):
    base, batch = make_family("llama"), make_batch()
    first = load_family(base, "llama")
    first.model.save_pretrained(tmp_path)
    wanted = completion_logprobs(first, batch).values.detach()
    policy = load_family(base, "llama", adapter={"start": str(tmp_path)})
    assert num_fused(policy) == FUSED["llama"][:3]
    for tensor in policy.trained_parameters().values():
        tensor.data.mul_(0.5)
    with as_reference(policy):
        assert apart(completion_logprobs(policy, batch).values, wanted) <= 1e-6
    assert apart(completion_logprobs(policy, batch).values, wanted) > 0.01


def test_float32_scores_of_a_bf16_policy_are_those_of_its_own_layers(make_family):
    base, batch, found = make_family("gemma3"), make_batch(), []
    for quantization in ("none", "nf4"):
        policy = load_family(base, "gemma3", "bf16", quantization=quantization)
        with unfused():
            plain = load_family(base, "gemma3", "bf16", quantization=quantization)
        for each in (policy, plain):
            compute_in_float32(each)
            with torch.no_grad():
                found.append(completion_logprobs(each, batch).values)
        assert found[-1].dtype == torch.float32
        assert apart(*found[-2:]) <= 1e-5


def test_generated_tokens_are_the_same(make_family):
    base, prompt = make_family("gemma3"), torch.arange(10, 30)[None]
    policy = load_family(base, "gemma3")
    with unfused():
        plain = load_family(base, "gemma3")
    answers = []
    for each in (policy, plain):
        each.share_prompts(False)
        each.model.eval()
        call = {"max_new_tokens": 12, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
        with torch.no_grad():
            answers.append(each.model.generate(input_ids=prompt, attention_mask=torch.ones_like(prompt), **call))
    assert torch.equal(answers[0].sequences, answers[1].sequences)
    assert apart(*(torch.stack(answer.logits) for answer in answers)) <= 1e-5


# Names and files.


@pytest.mark.parametrize("family", ["qwen3", "gemma3", "olmo2"])
def test_names_of_parameters_and_their_order_are_unchanged(family, make_family):
    policy = load_family(make_family(family), family)
    with unfused():
        plain = load_family(make_family(family), family)
    assert list(policy.model.state_dict()) == list(plain.model.state_dict())
    assert list(policy.trained_parameters()) == list(plain.trained_parameters())
    assert policy.quantized_modules() == []
    assert {name for name, _ in policy.model.named_buffers()} == {name for name, _ in plain.model.named_buffers()}


def test_a_saved_adapter_loads_into_plain_peft(make_family, tmp_path):
    base = make_family("qwen3")
    policy = load_family(base, "qwen3")
    policy.model.save_pretrained(tmp_path)
    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), tmp_path)
    policy.share_prompts(False)
    ids = torch.arange(40)[None]
    with torch.no_grad():
        assert apart(policy.model.eval()(ids).logits, plain(ids).logits) <= 1e-5
    assert json.loads((tmp_path / "adapter_config.json").read_text())["auto_mapping"] is None
    assert len(load_file(tmp_path / "adapter_model.safetensors")) == len(policy.trained_parameters())


def test_the_mode_reaches_the_familys_own_layers(make_family):
    """Which fall back to their own code, where dropout of attention weights depends on it."""
    policy = load_family(make_family("llama"), "llama")
    own = [module._own[0] for module in policy.decoder.modules() if isinstance(module, SelfAttention | GatedMLP)]
    for mode in (False, True):
        policy.model.train(mode)
        assert {module.training for module in own} == {mode}


# Hooks.


HOOKABLE = (
    "self_attn.q_proj",
    "self_attn.q_norm",
    "self_attn.o_proj",
    "self_attn.v_proj.lora_A.default",
    "mlp",
    "mlp.gate_proj",
    "mlp.down_proj",
    "mlp.act_fn",
    "mlp.up_proj.base_layer",
)


@pytest.mark.parametrize(
    ("layer", "kind"),
    [("self_attn", "forward"), *((layer, kind) for layer in HOOKABLE for kind in ("forward", "backward"))],
)
def test_a_hook_on_a_layer_is_called_and_its_answer_counts(layer, kind, make_family):
    policy, batch, calls = load_family(make_family("qwen3"), "qwen3"), make_batch(), []
    before = outcome(policy, batch)

    def forward(module, inputs, output):
        calls.append(module)
        return (output[0] + 0.5, *output[1:]) if isinstance(output, tuple) else output + 0.5

    def backward(module, incoming, outgoing):
        calls.append(module)

    module = policy.decoder.layers[1].get_submodule(layer)
    if kind == "forward":
        module.register_forward_hook(forward)
    else:
        module.register_full_backward_hook(backward)
    found = outcome(policy, batch)
    assert calls == [module]
    if kind == "forward":
        assert apart(found["values"], before["values"]) > 1e-4
    else:
        assert furthest(found, before) <= 1e-5


def test_a_hooked_layer_counts_where_attention_falls_back(make_family):
    """A norm of heads is fused too, and is the one that the family's own code calls."""
    policy, calls = load_family(make_family("qwen3"), "qwen3"), []
    policy.decoder.layers[0].self_attn.q_norm.register_forward_hook(lambda *call: calls.append(call))
    policy.share_prompts(False)
    completion_logprobs(policy, make_batch())
    assert len(calls) == 1
