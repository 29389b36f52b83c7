"""Multimodal checkpoints: their text part is trained, under the names of the class that config.json names, and a merge
leaves everything else as it was."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from edited_runs import reseal
from merge_cases import logits_of, merge, moved, trained_policy
from safetensors.torch import load_file, save_file
from tiny_models import TinyModel

from qpref.memory.shape import model_shape
from qpref.policy.load import load_policy
from qpref.policy.source import resolve_base
from qpref.recipe.sections import AdapterSection, ModelSection, Recipe

PLAIN, WRAPPED = "base_model.model.model.layers.", "base_model.model.model.language_model.layers."


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """Qwen2.5-VL: AutoModelForCausalLM doesn't know it, and its rotary positions have three axes."""
    rope = {"rope_theta": 1e6, "rope_type": "default", "mrope_section": [2, 3, 3]}
    tokens = dict(zip(("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id"),
                      range(300, 304), strict=True))  # fmt: skip
    model = TinyModel(
        model_type="qwen2_5_vl", class_name="Qwen2_5_VLForConditionalGeneration", text={"rope_parameters": rope},
        config=tokens,
    )  # fmt: skip
    return model.write(tmp_path_factory.mktemp("qwen2_5_vl"))


@pytest.fixture
def run(trained_run, base) -> Path:
    return trained_run(base, **{"model.quantization": "nf4"})


def own_class(folder: Path):
    from transformers import Qwen2_5_VLForConditionalGeneration

    return Qwen2_5_VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()


def in_nf4(folder: Path):
    """The base as plain transformers loads it in 4 bits; its weights stay as they are on every CPU."""
    from transformers import BitsAndBytesConfig, Qwen2_5_VLForConditionalGeneration

    config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )  # fmt: skip
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32, quantization_config=config)
    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False
    return model.eval()


def test_the_adapter_means_the_same_on_the_class_that_the_config_names(run, base):
    from peft import PeftModel

    adapted = PeftModel.from_pretrained(in_nf4(base), run / "adapter").eval()
    assert sum(value.abs().sum() for name, value in adapted.named_parameters() if "lora_B" in name) > 0
    assert (logits_of(adapted) - logits_of(trained_policy(run).model)).abs().max() < 1e-4


def test_a_merge_changes_the_text_part_alone(run, base, tmp_path):
    merge(run, tmp_path / "out", "bf16")
    before, after = (load_file(folder / "model.safetensors") for folder in (base, tmp_path / "out"))
    others = {name for name in before if ".visual." in name or name.startswith("visual.")}
    assert others
    assert before.keys() == after.keys()
    assert all(after[name].dtype == before[name].dtype for name in others)
    assert all(torch.equal(after[name], before[name]) for name in others)
    assert {after[name].dtype for name in before.keys() - others} == {torch.bfloat16}


def test_merged_logits_are_those_of_the_trained_policy(run, tmp_path):
    merge(run, tmp_path / "out", "float32")
    assert (logits_of(own_class(tmp_path / "out")) - logits_of(trained_policy(run).model)).abs().max() < 1e-4


def test_a_merge_in_4_bits_leaves_the_other_weights_as_they_are(run, base, tmp_path):
    merge(run, tmp_path / "out", quantize="nf4")
    model = own_class(tmp_path / "out")
    assert not [module for module in model.model.visual.modules() if isinstance(module, Linear4bit)]
    visual = own_class(base).model.visual.state_dict()
    assert all(torch.equal(value, visual[name]) for name, value in model.model.visual.state_dict().items())
    assert torch.isfinite(logits_of(model)).all()


def test_weights_that_no_text_needs_are_not_held(base):
    policy = load_policy(recipe(base), resolve_base(recipe(base).model))
    held = {name for name, value in policy.plain_model.named_parameters() if value.device.type != "meta"}
    assert held
    assert not [name for name in held if "visual" in name]


def test_a_setting_that_the_wrapper_ignores_is_ignored():
    """Aya Vision's own code leaves out the factor on its text model's logits."""
    from qpref.policy.head import Head

    vision = TinyModel(model_type="aya_vision", class_name="AyaVisionForConditionalGeneration", text={})
    text = TinyModel(model_type="cohere2")
    assert Head.of(vision.make()).scale == 1.0
    assert Head.of(text.make()).scale == text.configuration().logit_scale != 1.0


def test_the_text_part_alone_is_planned(base):
    shape = model_shape(ModelSection(base=str(base)), AdapterSection(rank=4))
    policy = load_policy(recipe(base), resolve_base(recipe(base).model))
    held = [value for value in policy.plain_model.parameters() if value.device.type != "meta"]
    assert shape.num_layers == 2
    assert shape.parameters == sum(value.numel() for value in held) - sum(shape.adapter_sizes)


def test_an_adapter_of_the_text_class_is_still_an_adapter_of_the_checkpoint(run, base, tmp_path):
    old_run, _ = moved(run, base, tmp_path)
    rename(old_run / "adapter")
    reseal(old_run)
    merge(run, tmp_path / "new", "float32")
    merge(old_run, tmp_path / "old", "float32")
    new, old = (load_file(tmp_path / name / "model.safetensors") for name in ("new", "old"))
    assert all(torch.equal(new[name], old[name]) for name in new)
    started = recipe(base, "nf4", start=str(old_run / "adapter"))
    policy = load_policy(started, resolve_base(started.model))
    policy.share_prompts(False)
    assert (logits_of(policy.model.eval()) - logits_of(trained_policy(run).model)).abs().max() < 1e-4


def rename(adapter: Path) -> None:
    """Give an adapter the names that it has when its text is loaded as a model of its own."""
    tensors = load_file(adapter / "adapter_model.safetensors")
    assert all(name.startswith(WRAPPED) for name in tensors)
    renamed = {name.replace(WRAPPED, PLAIN): value for name, value in tensors.items()}
    save_file(renamed, adapter / "adapter_model.safetensors", metadata={"format": "pt"})
    config = json.loads((adapter / "adapter_config.json").read_text())
    config["target_modules"] = sorted({name.split(".lora_")[0].removeprefix("base_model.model.") for name in renamed})
    (adapter / "adapter_config.json").write_text(json.dumps(config))


def recipe(base: Path, quantization: str = "none", start: str | None = None) -> Recipe:
    return Recipe.model_validate({
        "model": {"base": str(base), "quantization": quantization, "dtype": "float32"},
        "adapter": {"start": start} if start else {"rank": 4},
        "data": {"train": "none"},
        "loss": {"name": "none"},
    })  # fmt: skip
