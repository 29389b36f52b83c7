"""The model is its own reference: exactly the base (or the start adapter), leaving no trace, and scored once a row."""

from __future__ import annotations

import json
import random
from array import array
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from qpref.data.pack import pack
from qpref.errors import PolicyError
from qpref.policy.head import Head
from qpref.policy.load import load_policy
from qpref.policy.logprobs import completion_logprobs
from qpref.policy.policy import Policy
from qpref.policy.reference import ReferenceStore, as_reference, frozen, row_keys
from qpref.policy.source import resolve_base
from qpref.recipe.sections import Recipe
from qpref.records import PackedBatch, Source, TokenizedExample

CPU = torch.device("cpu")


def make_example(prompt: list[int], *branches: list[int]) -> TokenizedExample:
    return TokenizedExample(
        prompt=array("i", prompt),
        branches=tuple(array("i", branch) for branch in branches),
        truncated=(False,) * len(branches),
        weight=1.0,
        margin=0.0,
        source=Source(path="made", line=1),
    )


def random_example(seed: int) -> TokenizedExample:
    draw = random.Random(seed)
    return make_example(*([draw.randrange(256) for _ in range(draw.randint(1, 9))] for _ in range(3)))


EXAMPLES = [random_example(seed) for seed in range(4)]


def randomize(policy: Policy, seed: int = 1) -> None:
    """Let the trained adapter be as after many steps."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in policy.trained_parameters().values():
        parameter.data.normal_(std=0.2, generator=generator)


Load = Callable[..., Policy]


@pytest.fixture
def load(make_base, make_recipe) -> Load:
    base = make_base(initializer_range=0.2)

    def load(changes: dict[str, object] | None = None) -> Policy:
        recipe = Recipe.model_validate(make_recipe({"model.base": str(base)} | (changes or {})))
        policy = load_policy(recipe, resolve_base(recipe.model))
        policy.model.train()
        return policy

    return load


@pytest.fixture
def start(load, tmp_path) -> Path:
    """A folder with an adapter that changes the base."""
    policy, folder = load(), tmp_path / "start"
    randomize(policy, seed=5)
    policy.model.save_pretrained(folder)
    return folder


def score(policy: Policy, batch: PackedBatch) -> torch.Tensor:
    return completion_logprobs(policy, batch).values.detach()


def reference_score(policy: Policy, batch: PackedBatch) -> torch.Tensor:
    with as_reference(policy):
        return completion_logprobs(policy, batch).values


def bare_base(policy: Policy, base: str, **settings) -> Policy:
    """The same base without any adapter layer around its linear ones."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, **settings)
    model.set_attn_implementation(policy.attention)
    return replace(policy, model=model, decoder=model.get_decoder(), head=Head.of(model))


@pytest.mark.parametrize("dtype", ["float32", "bf16"])
@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_reference_is_the_bare_base_to_the_bit(quantization, dtype, load, make_base):
    from transformers import BitsAndBytesConfig

    policy = load({"model.quantization": quantization, "model.dtype": dtype, "adapter.dropout": 0.5})
    randomize(policy)
    settings = {"dtype": policy.dtype, "device_map": {"": CPU}}
    if quantization == "nf4":
        settings["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=policy.dtype,
        )  # fmt: skip
    bare = bare_base(policy, str(make_base(initializer_range=0.2)), **settings)
    batch = pack(EXAMPLES, CPU)
    # With gradients on: bitsandbytes' first pass in eval mode without any would repack the bare model's weights.
    bare.model.train()
    assert torch.equal(reference_score(policy, batch), score(bare, batch))


def test_a_random_adapter_changes_what_the_policy_says(load):
    policy, batch = load(), pack(EXAMPLES, CPU)
    randomize(policy)
    assert (score(policy, batch) - reference_score(policy, batch)).abs().max() > 0.1


def test_a_fresh_adapter_changes_nothing_to_the_bit(load):
    policy, batch = load(), pack(EXAMPLES, CPU)
    assert torch.equal(score(policy, batch), reference_score(policy, batch))


def test_reference_is_untouched_by_the_trained_adapter(load):
    policy, batch = load({"model.quantization": "nf4"}), pack(EXAMPLES, CPU)
    before = reference_score(policy, batch)
    randomize(policy)
    assert torch.equal(reference_score(policy, batch), before)


def test_two_reference_passes_are_equal_to_the_bit_with_dropout_in_the_recipe(load):
    policy, batch = load({"adapter.dropout": 0.5}), pack(EXAMPLES, CPU)
    randomize(policy)
    assert torch.equal(*reference_scores_of_two_steps(policy, batch))
    before = score(policy, batch)
    policy.seed_dropout(0, 3)
    assert not torch.equal(score(policy, batch), before)  # there is dropout to switch off


def test_a_start_adapter_as_reference_has_no_dropout(load, start):
    policy, batch = load({"adapter.dropout": 0.5, "adapter.start": str(start)}), pack(EXAMPLES, CPU)
    assert torch.equal(*reference_scores_of_two_steps(policy, batch))


def reference_scores_of_two_steps(policy, batch):
    """The reference's scores in two steps, whose dropout differs."""
    scores = []
    for step in (1, 2):
        policy.seed_dropout(0, step)
        scores.append(reference_score(policy, batch))
    return scores


def test_a_reference_pass_draws_no_random_number(load):
    policy, batch = load({"adapter.dropout": 0.5}), pack(EXAMPLES, CPU)
    before = torch.get_rng_state()
    reference_score(policy, batch)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_frozen_policy_builds_no_graph(load):
    policy = load()
    with frozen(policy):
        assert not completion_logprobs(policy, pack(EXAMPLES, CPU)).values.requires_grad


def test_a_reference_pass_builds_no_graph(load):
    policy = load()
    with as_reference(policy):
        assert not torch.is_grad_enabled()
    assert torch.is_grad_enabled()


def state(policy: Policy) -> tuple[dict[str, bool], dict[str, bool]]:
    """Which parameters have a gradient, and which modules are in training mode."""
    gradients = {name: parameter.requires_grad for name, parameter in policy.model.named_parameters()}
    return gradients, {name: module.training for name, module in policy.model.named_modules()}


@pytest.mark.parametrize("raising", [False, True], ids=["returns", "raises"])
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("starts", [False, True], ids=["fresh", "start"])
def test_the_policy_is_as_before_when_a_reference_pass(starts, training, raising, load, start):
    policy, batch = load({"adapter.start": str(start)} if starts else {}), pack(EXAMPLES, CPU)
    randomize(policy)
    policy.model.train(training)
    before, scores = state(policy), score(policy, batch)
    try:
        with as_reference(policy):
            completion_logprobs(policy, batch)
            if raising:
                raise LookupError
    except LookupError:
        assert raising
    assert state(policy) == before
    assert torch.equal(score(policy, batch), scores)


def gradients(policy: Policy, batch: PackedBatch, reference_at: str) -> dict[str, torch.Tensor]:
    """Of chosen less rejected, with a reference pass before the policy's forward pass, after it, or none."""
    policy.model.zero_grad(set_to_none=True)
    if reference_at == "before":
        reference_score(policy, batch)
    totals = completion_logprobs(policy, batch).total
    if reference_at == "after":
        reference_score(policy, batch)
    (totals[0::2] - totals[1::2]).sum().backward()
    return {name: parameter.grad for name, parameter in policy.trained_parameters().items()}


@pytest.mark.parametrize("reference_at", ["before", "after"])
@pytest.mark.parametrize("starts", [False, True], ids=["fresh", "start"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "checkpointed"])
def test_a_reference_pass_changes_no_gradient(checkpointing, starts, reference_at, load, start):
    changes = {"train.gradient_checkpointing": checkpointing} | ({"adapter.start": str(start)} if starts else {})
    policy, batch = load(changes), pack(EXAMPLES, CPU)
    randomize(policy)
    wanted = gradients(policy, batch, "never")
    found = gradients(policy, batch, reference_at)
    assert min(value.abs().max() for value in wanted.values()) > 0
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_the_start_adapter_is_the_reference(load, start, make_base):
    from peft import PeftModel

    policy, batch = load({"adapter.start": str(start)}), pack(EXAMPLES, CPU)
    bare = bare_base(policy, str(make_base(initializer_range=0.2)), dtype=torch.float32)
    frozen = replace(bare, model=PeftModel.from_pretrained(bare.model, start))
    # PEFT's own layers add up in another order.
    torch.testing.assert_close(reference_score(policy, batch), score(frozen, batch), rtol=2e-5, atol=1e-4)


def test_the_trained_adapter_starts_from_the_start_adapter(load, start):
    policy, batch = load({"adapter.start": str(start)}), pack(EXAMPLES, CPU)
    assert torch.equal(score(policy, batch), reference_score(policy, batch))


def test_the_start_adapter_stays_as_it_was_while_the_trained_one_moves(load, start):
    policy, batch = load({"adapter.start": str(start)}), pack(EXAMPLES, CPU)
    before = reference_score(policy, batch)
    optimizer = torch.optim.AdamW(policy.trained_parameters().values(), lr=0.1)
    completion_logprobs(policy, batch).values.sum().backward()
    optimizer.step()
    assert (score(policy, batch) - before).abs().max() > 0.1
    assert torch.equal(reference_score(policy, batch), before)


def test_the_start_adapters_rank_and_alpha_hold(load, tmp_path):
    other = load({"adapter.rank": 2, "adapter.alpha": 6.0, "adapter.rslora": True, "adapter.targets": ["q_proj"]})
    other.model.save_pretrained(tmp_path / "other")
    policy = load({"adapter.start": str(tmp_path / "other")})
    layer = policy.decoder.layers[0].self_attn.q_proj
    assert layer.lora_A["default"].weight.shape == (2, 64)
    assert layer.scaling["default"] == layer.scaling["reference"] == pytest.approx(6.0 / 2**0.5)
    assert {name.split(".")[-4] for name in policy.trained_parameters()} == {"q_proj"}


FIRST = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


def without_first(tensors):
    return {name: value for name, value in tensors.items() if name != FIRST}


BAD_TENSORS = {
    "a missing key": (without_first, r"not an adapter for this base: it lacks .*q_proj.* \(1 missing, 0 unknown\)"),
    "a key too many": (lambda tensors: tensors | {"other": torch.zeros(1)}, r"it has other \(0 missing, 1 unknown\)"),
    "another shape": (lambda tensors: tensors | {FIRST: torch.zeros(4, 65)}, r"is \(4, 65\), the base needs \(4, 64\)"),
    "a NaN": (lambda tensors: tensors | {FIRST: tensors[FIRST] * torch.nan}, "has values that are not finite"),
    "an infinity": (lambda tensors: tensors | {FIRST: tensors[FIRST] + torch.inf}, "has values that are not finite"),
}


@pytest.mark.parametrize("bad", BAD_TENSORS)
def test_a_start_adapter_is_refused_for(bad, load, start):
    change, reason = BAD_TENSORS[bad]
    path = start / "adapter_model.safetensors"
    save_file(change(load_file(path)), path)
    with pytest.raises(PolicyError, match=reason):
        load({"adapter.start": str(start)})


BAD_CONFIGS = {
    "use_dora": ({"use_dora": True}, "uses use_dora, so it is no plain LoRA delta"),
    "bias": ({"bias": "all"}, "uses bias, so it is no plain LoRA delta"),
    "modules_to_save": ({"modules_to_save": ["lm_head"]}, "uses modules_to_save"),
    "trainable tokens": ({"trainable_token_indices": [1]}, "uses trainable_token_indices"),
    "invocation tokens": ({"alora_invocation_tokens": [1]}, "uses alora_invocation_tokens"),
    "a base that it changed": ({"init_lora_weights": "pissa"}, "uses init_lora_weights"),
    "another type": ({"peft_type": "IA3"}, "a IA3 adapter; only LoRA can be trained on from"),
    "targets of another model": ({"target_modules": ["query"]}, "doesn't fit the base"),
}


@pytest.mark.parametrize("bad", BAD_CONFIGS)
def test_a_start_adapter_is_refused_for_its_config(bad, load, start):
    changes, reason = BAD_CONFIGS[bad]
    path = start / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(PolicyError, match=reason):
        load({"adapter.start": str(start)})


def test_a_pickled_start_adapter_is_refused(load, start):
    (start / "adapter_model.safetensors").rename(start / "adapter_model.bin")
    with pytest.raises(PolicyError, match="no adapter in PEFT's format with safetensors"):
        load({"adapter.start": str(start)})


def test_a_folder_without_an_adapter_is_refused(load, tmp_path):
    with pytest.raises(PolicyError, match="no adapter in PEFT's format"):
        load({"adapter.start": str(tmp_path / "nothing")})


def test_a_second_look_up_computes_nothing(load):
    policy, batch, store = load(), pack(EXAMPLES, CPU), ReferenceStore()
    first = store.logprobs(policy, batch)
    assert store.num_computed == 4
    second = store.logprobs(policy, batch)
    assert store.num_computed == 4
    assert torch.equal(first.values, second.values)
    assert first.lengths == second.lengths


def test_what_is_remembered_is_what_the_reference_said(load):
    policy, batch = load(), pack(EXAMPLES, CPU)
    randomize(policy)
    assert torch.equal(ReferenceStore().logprobs(policy, batch).values, reference_score(policy, batch))


def test_rows_are_found_by_content_in_any_order_and_packing(load):
    policy, store = load(), ReferenceStore()
    scores = store.logprobs(policy, pack(EXAMPLES, CPU)).values.split([len(b) for e in EXAMPLES for b in e.branches])
    for order in ([3, 1, 0, 2], [2], [0, 0]):
        again = store.logprobs(policy, pack([EXAMPLES[place] for place in order], CPU)).values
        assert torch.equal(again, torch.cat([scores[2 * place + side] for place in order for side in (0, 1)]))
    assert store.num_computed == 4


def test_what_is_not_part_of_the_text_is_not_part_of_the_key():
    example = EXAMPLES[0]
    other = replace(example, weight=2.0, margin=1.0, source=Source(path="other", line=9))
    assert row_keys(other) == row_keys(example)


def test_sides_are_remembered_apart(load):
    policy, store = load(), ReferenceStore()
    prompt, chosen, rejected = EXAMPLES[0].prompt, *EXAMPLES[0].branches
    scores = store.logprobs(policy, pack([EXAMPLES[0]], CPU)).values.split([len(chosen), len(rejected)])
    swapped = store.logprobs(policy, pack([make_example(prompt, rejected, chosen)], CPU)).values
    assert store.num_computed == 1
    assert torch.equal(swapped, torch.cat([scores[1], scores[0]]))


def test_a_key_is_of_the_prompt_the_response_and_where_one_ends():
    same_text = [
        make_example([1, 2, 3], [4, 5]),
        make_example([1, 2], [3, 4, 5]),
        make_example([1], [2, 3, 4, 5]),
        make_example([1, 2, 3, 4], [5]),
        make_example([1, 2, 3], [4, 6]),
        make_example([1, 2, 4], [4, 5]),
    ]
    assert len({key for example in same_text for key in row_keys(example)}) == len(same_text)


def test_a_known_row_keeps_its_first_value_when_a_new_row_comes_with_it(load):
    policy, store = load(), ReferenceStore()
    store.logprobs(policy, pack(EXAMPLES[:1], CPU))
    for values in store.rows.values():
        values += 1  # as if first scored in a batch of another shape, in bf16
    known = torch.cat(list(store.rows.values()))
    both = store.logprobs(policy, pack(EXAMPLES[1::-1], CPU)).values
    assert store.num_computed == 3
    assert torch.equal(both[-len(known) :], known)


def test_the_store_survives_its_tensors_to_the_bit(load, tmp_path):
    policy, batch, store = load(), pack(EXAMPLES, CPU), ReferenceStore()
    scores = store.logprobs(policy, batch)
    save_file(store.to_tensors(), tmp_path / "store.safetensors")
    restored = ReferenceStore()
    restored.restore(load_file(tmp_path / "store.safetensors"))
    assert list(restored.rows) == sorted(store.rows)
    assert torch.equal(restored.logprobs(policy, batch).values, scores.values)
    assert restored.num_computed == 0


def test_an_empty_store_survives_its_tensors():
    restored = ReferenceStore()
    restored.restore(ReferenceStore().to_tensors())
    assert restored.rows == {}
