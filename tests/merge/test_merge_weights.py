"""The merged folder holds the weights that were trained: same logits, plain files."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from merge_cases import lock_of, logits_of, merge, merged_logits, trained_policy
from safetensors import safe_open
from safetensors.torch import load_file

from qpref.merging import write
from qpref.merging.guards import read_run
from qpref.merging.rounding import STORED
from qpref.policy.source import resolve_base
from qpref.recipe.resolve import make_plan


@pytest.mark.parametrize("family", ["llama", "qwen", "gemma3"])
@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_merged_logits_equal_the_trained_policys(trained_run, make_base, tmp_path, family, quantization):
    run = trained_run(make_base(family), **{"model.quantization": quantization})
    merge(run, tmp_path / "out", "float32")
    base = trained_policy(run)
    expected = logits_of(base.model)
    with base.model.disable_adapter():
        learned = (expected - logits_of(base.model)).abs().max()
    assert learned > 0.05
    assert (merged_logits(tmp_path / "out") - expected).abs().max() < 1e-4


def test_an_adapter_on_the_head_is_merged(trained_run, tmp_path):
    run = trained_run(**{"adapter.targets": ["v_proj", "lm_head"]})
    merge(run, tmp_path / "out", "float32")
    policy = trained_policy(run)
    assert policy.trained_parameters()["base_model.model.lm_head.lora_B.default.weight"].abs().max() > 0.01
    assert (merged_logits(tmp_path / "out") - logits_of(policy.model)).abs().max() < 1e-4


def test_a_bf16_run_merges_onto_its_own_dequantized_weights(trained_run, make_base, tmp_path):
    run = trained_run(make_base(), **{"model.quantization": "nf4", "model.dtype": "bf16"})
    merge(run, tmp_path / "out", "float32")
    # Dequantized in bf16 as in training, then computed in float32 on both sides.
    policy = trained_policy(run)
    dense = policy.model.get_base_model()
    for name, module in list(dense.named_modules()):
        if hasattr(module, "base_layer"):
            from bitsandbytes.functional import dequantize_4bit

            weight = dequantize_4bit(module.base_layer.weight.data, module.base_layer.weight.quant_state).float()
            scale = module.scaling["default"]
            weight = weight + scale * module.lora_B["default"].weight @ module.lora_A["default"].weight
            merged = load_file(tmp_path / "out/model.safetensors")[f"{name}.weight"]
            assert torch.equal(merged, weight.detach())


def test_an_already_quantized_base_is_merged_from_its_stored_state(trained_run, make_base, tmp_path):
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    quantization = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype="float32"
    )
    base = tmp_path / "prequantized"
    shutil.copytree(make_base(), base)
    (base / "model.safetensors").unlink()
    model = AutoModelForCausalLM.from_pretrained(make_base(), quantization_config=quantization, dtype=torch.float32)
    model.save_pretrained(base)
    run = trained_run(base, **{"model.quantization": "nf4"})
    merge(run, tmp_path / "out", "float32")
    assert "quantization_config" not in json.loads((tmp_path / "out/config.json").read_text())
    assert not [key for key in load_file(tmp_path / "out/model.safetensors") if "quant" in key or "absmax" in key]
    assert (merged_logits(tmp_path / "out") - logits_of(trained_policy(run).model)).abs().max() < 1e-4


@pytest.mark.parametrize("rslora", [False, True])
def test_rank_stabilized_scaling_is_merged(trained_run, tmp_path, rslora):
    run = trained_run(**{"adapter.rslora": rslora})
    merge(run, tmp_path / "out", "float32")
    assert (merged_logits(tmp_path / "out") - logits_of(trained_policy(run).model)).abs().max() < 1e-4


@pytest.mark.parametrize("shard_bytes", [1, 100_000, 10**9])
def test_shards_and_index_agree_with_what_is_on_disk(trained_run, make_base, tmp_path, monkeypatch, shard_bytes):
    from transformers import AutoModelForCausalLM

    base = tmp_path / "sharded"
    shutil.copytree(make_base(), base)
    (base / "model.safetensors").unlink()
    AutoModelForCausalLM.from_pretrained(make_base()).save_pretrained(base, max_shard_size="100KB")
    run = trained_run(base)
    out = tmp_path / "out"
    monkeypatch.setattr(write, "SHARD_BYTES", shard_bytes)
    merge(run, out, "float32")
    on_disk = {}
    for file in out.glob("*.safetensors"):
        with safe_open(file, "pt") as shard:
            assert not set(on_disk) & set(shard.keys())
            on_disk |= dict.fromkeys(shard.keys(), file.name)
    if shard_bytes == 10**9:
        assert set(on_disk.values()) == {"model.safetensors"}
        assert not (out / "model.safetensors.index.json").exists()
    else:
        index = json.loads((out / "model.safetensors.index.json").read_text())
        assert index["weight_map"] == on_disk
        sizes = {name: tensor.nbytes for file in out.glob("*.safetensors") for name, tensor in load_file(file).items()}
        assert index["metadata"]["total_size"] == sum(sizes.values())
        for name in set(on_disk.values()):
            inside = [sizes[key] for key, place in on_disk.items() if place == name]
            assert len(inside) == 1 or sum(inside) <= shard_bytes
    assert (merged_logits(out) - logits_of(trained_policy(run).model)).abs().max() < 1e-4


def test_a_tied_head_is_stored_once_and_stays_tied(trained_run, make_base, tmp_path):
    from transformers import AutoModelForCausalLM

    merge(trained_run(make_base("qwen")), tmp_path / "out", "bf16")
    assert "lm_head.weight" not in load_file(tmp_path / "out/model.safetensors")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "float32"])
def test_the_sum_is_taken_in_float32_and_rounded_once(trained_run, make_base, tmp_path, dtype):
    run = trained_run(make_base(), **{"model.quantization": "nf4", "model.dtype": "bf16"})
    merge(run, tmp_path / "out", dtype)
    merged, opened = load_file(tmp_path / "out/model.safetensors"), read_run(run)
    for key in opened.base.tensors:
        weight, module = opened.base.as_trained(key).float(), opened.base.module_of(key)
        exact = weight + opened.delta.of(module) if module in opened.delta.modules else weight
        assert torch.equal(merged[key], exact.to(STORED[dtype])), key


def test_kept_is_the_projection_of_what_is_stored_on_what_was_learned(trained_run, tmp_path):
    run = trained_run()
    result = merge(run, tmp_path / "out", "bf16")
    exact = tmp_path / "exact"
    merge(run, exact, "float32")
    base = load_file(resolve_base(make_plan(lock_of(run)).recipe.model).path / "model.safetensors")
    stored, wanted = load_file(tmp_path / "out/model.safetensors"), load_file(exact / "model.safetensors")
    survived = learned = 0.0
    for name in [name for name in base if "proj" in name]:
        delta = wanted[name].double() - base[name].double()
        survived += float(((stored[name].double() - base[name].double()) * delta).sum())
        learned += float((delta * delta).sum())
    assert result.kept["bf16"] == pytest.approx(survived / learned, rel=1e-4)


def test_the_folder_is_plain_and_readable_by_others(trained_run, tmp_path):
    out = tmp_path / "out"
    merge(trained_run(**{"model.quantization": "nf4"}), out, "bf16")
    config = json.loads((out / "config.json").read_text())
    assert "quantization_config" not in config
    assert config["dtype"] == "bfloat16"
    assert {tensor.dtype for tensor in load_file(out / "model.safetensors").values()} == {torch.bfloat16}
    assert all(file.stat().st_mode & 0o044 == 0o044 for file in out.iterdir())
    assert not list(out.glob("adapter*"))
