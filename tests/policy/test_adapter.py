"""What is adapted, in which type, from which start; and that nothing else can move."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import make_tokenizer, tiny_config

from qpref.dropout import TokenDropout
from qpref.errors import PolicyError
from qpref.policy.load import load_policy
from qpref.policy.policy import Policy
from qpref.policy.source import resolve_base
from qpref.recipe.sections import Recipe

ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj"}
MLP = {"gate_proj", "up_proj", "down_proj"}

Load = Callable[..., Policy]


@pytest.fixture
def load(make_recipe) -> Load:
    def load(changes: dict[str, object] | None = None) -> Policy:
        recipe = Recipe.model_validate(make_recipe(changes or {}))
        return load_policy(recipe, resolve_base(recipe.model))

    return load


def adapted(policy: Policy) -> set[str]:
    """Names in the base model of the layers that have an adapter."""
    return {name.removeprefix("base_model.model.").partition(".lora_")[0] for name in policy.trained_parameters()}


def in_every_layer(*endings: str) -> set[str]:
    part = {ending: "self_attn" if ending in ATTENTION else "mlp" for ending in endings}
    return {f"model.layers.{layer}.{part[ending]}.{ending}" for layer in (0, 1) for ending in endings}


def test_all_linear_is_every_linear_layer_of_the_blocks_and_not_the_head(load):
    assert adapted(load({"adapter.targets": "all-linear"})) == in_every_layer(*ATTENTION, *MLP)


def test_all_linear_leaves_a_tied_head_alone(load, make_base):
    assert adapted(load({"model.base": str(make_base("qwen"))})) == in_every_layer(*ATTENTION, *MLP)


@pytest.fixture(scope="module")
def seeing_base(tmp_path_factory) -> Path:
    """A vision-language model whose vision tower has linear layers with the text model's names, q_proj and others."""
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2,
              "image_size": 28, "patch_size": 14}  # fmt: skip
    config = Gemma3Config(text_config=tiny_config("gemma3"), vision_config=vision, mm_tokens_per_image=4)
    folder = tmp_path_factory.mktemp("seeing")
    torch.manual_seed(0)
    Gemma3ForConditionalGeneration(config).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj"]], ids=str)
def test_a_vision_tower_is_left_alone(targets, load, seeing_base):
    names = adapted(load({"model.base": str(seeing_base), "adapter.targets": targets}))
    assert all(".language_model.layers." in name for name in names)
    endings = {name.rpartition(".")[2] for name in names}
    assert endings == (ATTENTION | MLP if targets == "all-linear" else {"q_proj"})


def test_an_ending_of_the_vision_tower_alone_is_unknown(load, seeing_base):
    with pytest.raises(PolicyError, match="'fc1' names no linear layer; it has down_proj, gate_proj, "):
        load({"model.base": str(seeing_base), "adapter.targets": ["fc1"]})


def test_endings_are_those_layers_alone(load):
    assert adapted(load({"adapter.targets": ["q_proj", "down_proj"]})) == in_every_layer("q_proj", "down_proj")


def test_an_ending_may_hold_its_parents_name(load):
    policy = load({"adapter.targets": ["layers.1.self_attn.v_proj"]})
    assert adapted(policy) == {"model.layers.1.self_attn.v_proj"}


def test_an_ending_is_a_whole_word(load):
    with pytest.raises(PolicyError, match=r"'proj' names no linear layer"):
        load({"adapter.targets": ["proj"]})


def test_an_unknown_ending_is_named_with_the_known_ones(load):
    with pytest.raises(PolicyError) as caught:
        load({"adapter.targets": ["q_proj", "query"]})
    assert str(caught.value) == (
        "[adapter] targets: 'query' names no linear layer; "
        "it has down_proj, gate_proj, k_proj, lm_head, o_proj, q_proj, up_proj, v_proj"
    )


def test_the_head_is_adapted_where_it_is_asked_for(load):
    assert adapted(load({"adapter.targets": ["q_proj", "lm_head"]})) == in_every_layer("q_proj") | {"lm_head"}


def test_a_tied_head_cannot_be_asked_for(load, make_base):
    with pytest.raises(PolicyError, match="an output head that shares its weight with the embeddings"):
        load({"adapter.targets": ["lm_head"], "model.base": str(make_base("qwen"))})


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_trained_parameters_are_float32_on_a_bf16_base(quantization, load):
    policy = load({"model.dtype": "bf16", "model.quantization": quantization})
    assert {parameter.dtype for parameter in policy.trained_parameters().values()} == {torch.float32}
    assert policy.head.weight.dtype == torch.bfloat16


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_nothing_but_the_trained_adapter_requires_a_gradient(quantization, load):
    policy = load({"model.quantization": quantization})
    moving = {name for name, parameter in policy.model.named_parameters() if parameter.requires_grad}
    assert moving == policy.trained_parameters().keys()
    assert len(moving) == 2 * len(in_every_layer(*ATTENTION, *MLP))


def test_with_a_start_adapter_its_frozen_copy_requires_no_gradient(load, tmp_path):
    load().model.save_pretrained(tmp_path / "start")
    policy = load({"adapter.start": str(tmp_path / "start")})
    moving = {name for name, parameter in policy.model.named_parameters() if parameter.requires_grad}
    assert moving == policy.trained_parameters().keys()
    assert all(".default." in name for name in moving)


@pytest.mark.parametrize(("rslora", "scaling"), [(False, 6 / 4), (True, 6 / 2)], ids=["rank", "root of rank"])
def test_the_update_is_scaled_by_alpha_over(rslora, scaling, load):
    policy = load({"adapter.rank": 4, "adapter.alpha": 6.0, "adapter.rslora": rslora})
    assert policy.decoder.layers[0].self_attn.q_proj.scaling == {"default": scaling}


def matrices(policy: Policy, which: str) -> torch.Tensor:
    return torch.cat([value.detach().flatten() for name, value in policy.trained_parameters().items() if which in name])


@pytest.mark.parametrize("init", ["default", "gaussian"])
def test_b_starts_at_zero_and_a_does_not(init, load):
    policy = load({"adapter.init": init})
    assert not matrices(policy, "lora_B").any()
    assert matrices(policy, "lora_A").all()


def test_gaussian_a_has_a_tail_and_default_a_is_bounded(load):
    # PEFT's default is uniform within 1 / sqrt(inputs), of which the smallest layer has 64; its gaussian has a standard
    # deviation of 1 / rank.
    assert matrices(load({"adapter.init": "default"}), "lora_A").abs().max() <= 1 / 64**0.5
    gaussian = matrices(load({"adapter.init": "gaussian"}), "lora_A")
    assert gaussian.std().item() == pytest.approx(1 / 4, rel=0.05)
    assert gaussian.abs().max() > 3 / 4


def test_the_same_seed_gives_the_same_start(load):
    torch.manual_seed(1)
    first = load({"train.seed": 3})
    torch.manual_seed(2)
    assert torch.equal(matrices(first, "lora"), matrices(load({"train.seed": 3}), "lora"))


def test_another_seed_gives_another_start(load):
    first, second = load({"train.seed": 3}), load({"train.seed": 4})
    assert not torch.equal(matrices(first, "lora_A"), matrices(second, "lora_A"))


def test_dropout_is_on_the_adapters_input_alone(load):
    policy = load({"adapter.dropout": 0.25})
    rates = {name: module.p for name, module in policy.model.named_modules() if isinstance(module, TokenDropout)}
    assert len(rates) == len(in_every_layer(*ATTENTION, *MLP))
    assert set(rates.values()) == {0.25}
    assert all("lora_dropout" in name for name in rates)
    assert not [name for name, module in policy.model.named_modules() if isinstance(module, torch.nn.Dropout)]
