"""The merged folder is the model that was trained: same logits, plain files, nothing half-written."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from qpref.errors import DiskError, MergeError, RecipeError
from qpref.merge.merge import merge_run
from qpref.merge.request import MergeRequest, MergeResult
from qpref.plan import make_plan
from qpref.policy.adapter import load_adapter_tensors
from qpref.policy.load import Policy, load_policy
from qpref.policy.source import resolve_base
from qpref.training.run import train_plan

PROMPT = list(range(20, 60))


@pytest.fixture
def train(make_recipe, make_base, tmp_path) -> Callable[..., Path]:
    """`train(family=..., **recipe changes)`: a finished run of three large steps."""

    def run(base: Path | None = None, **changes) -> Path:
        recipe = make_recipe({"train.learning_rate": 0.02, "model.base": str(base or make_base())} | changes)
        return train_plan(make_plan(recipe, output=tmp_path / "run"))

    return run


def merge(run: Path, out: Path, dtype: str = "auto", **asked) -> MergeResult:
    return merge_run(MergeRequest(run=run, out=out, dtype=dtype, **asked))


def trained_policy(run: Path, **model) -> Policy:
    """The policy of a run with its final adapter, loaded as training loads it."""
    import tomllib

    document = tomllib.loads((run / "recipe.lock.toml").read_text())
    document["model"] |= model
    plan = make_plan(document)
    policy = load_policy(plan.recipe, resolve_base(plan.recipe.model))
    load_adapter_tensors(policy.model, load_file(run / "adapter/adapter_model.safetensors"), "default", "the run")
    policy.share_prompts(False)
    policy.model.eval()
    return policy


@torch.no_grad()
def logits_of(model) -> torch.Tensor:
    return model(input_ids=torch.tensor([PROMPT]), use_cache=False).logits[0].float()


def merged_logits(out: Path) -> torch.Tensor:
    from transformers import AutoModelForCausalLM

    return logits_of(AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32))


@pytest.mark.parametrize("family", ["llama", "qwen", "gemma3"])
@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_merged_logits_equal_the_trained_policys(train, make_base, tmp_path, family, quantization):
    run = train(make_base(family), **{"model.quantization": quantization})
    merge(run, tmp_path / "out", "float32")
    base = trained_policy(run)
    expected = logits_of(base.model)
    with base.model.disable_adapter():
        learned = (expected - logits_of(base.model)).abs().max()
    assert learned > 0.05
    assert (merged_logits(tmp_path / "out") - expected).abs().max() < 1e-4


def test_an_adapter_on_the_head_is_merged(train, tmp_path):
    run = train(**{"adapter.targets": ["v_proj", "lm_head"]})
    merge(run, tmp_path / "out", "float32")
    policy = trained_policy(run)
    assert policy.trained_parameters()["base_model.model.lm_head.lora_B.default.weight"].abs().max() > 0.01
    assert (merged_logits(tmp_path / "out") - logits_of(policy.model)).abs().max() < 1e-4


def test_a_bf16_run_merges_onto_its_own_dequantized_weights(train, make_base, tmp_path):
    run = train(make_base(), **{"model.quantization": "nf4", "model.dtype": "bf16"})
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


def test_an_already_quantized_base_is_merged_from_its_stored_state(train, make_base, tmp_path):
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    quantization = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype="float32"
    )
    base = tmp_path / "prequantized"
    shutil.copytree(make_base(), base)
    (base / "model.safetensors").unlink()
    model = AutoModelForCausalLM.from_pretrained(make_base(), quantization_config=quantization, dtype=torch.float32)
    model.save_pretrained(base)
    run = train(base, **{"model.quantization": "nf4"})
    merge(run, tmp_path / "out", "float32")
    assert "quantization_config" not in json.loads((tmp_path / "out/config.json").read_text())
    assert not [key for key in load_file(tmp_path / "out/model.safetensors") if "quant" in key or "absmax" in key]
    assert (merged_logits(tmp_path / "out") - logits_of(trained_policy(run).model)).abs().max() < 1e-4


@pytest.mark.parametrize("rslora", [False, True])
def test_rank_stabilized_scaling_is_merged(train, tmp_path, rslora):
    run = train(**{"adapter.rslora": rslora})
    merge(run, tmp_path / "out", "float32")
    assert (merged_logits(tmp_path / "out") - logits_of(trained_policy(run).model)).abs().max() < 1e-4


def test_shards_and_index_agree_with_what_is_on_disk(train, make_base, tmp_path):
    from transformers import AutoModelForCausalLM

    base = tmp_path / "sharded"
    shutil.copytree(make_base(), base)
    (base / "model.safetensors").unlink()
    AutoModelForCausalLM.from_pretrained(make_base()).save_pretrained(base, max_shard_size="100KB")
    run = train(base)
    out = tmp_path / "out"
    merge(run, out, "float32")
    index = json.loads((out / "model.safetensors.index.json").read_text())
    on_disk = {}
    for file in out.glob("*.safetensors"):
        with safe_open(file, "pt") as shard:
            on_disk |= dict.fromkeys(shard.keys(), file.name)
    assert index["weight_map"] == on_disk
    assert len(set(on_disk.values())) > 1
    assert (merged_logits(out) - logits_of(trained_policy(run).model)).abs().max() < 1e-4


def test_a_tied_head_is_stored_once_and_stays_tied(train, make_base, tmp_path):
    from transformers import AutoModelForCausalLM

    merge(train(make_base("qwen")), tmp_path / "out", "bf16")
    assert "lm_head.weight" not in load_file(tmp_path / "out/model.safetensors")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_auto_leaves_bf16_where_it_would_round_the_change_away(train, make_base, tmp_path):
    run = train(make_base(dtype=torch.bfloat16), **{"train.learning_rate": 1e-5, "model.dtype": "bf16"})
    result = merge(run, tmp_path / "out")
    assert result.kept["bf16"] < 0.9
    assert result.dtype in ("fp16", "float32")
    assert result.kept[result.dtype] >= 0.98


def test_auto_takes_bf16_where_it_keeps_the_change(train, tmp_path):
    assert merge(train(**{"train.learning_rate": 0.1}), tmp_path / "out").dtype == "bf16"


def test_kept_is_the_projection_of_what_is_stored_on_what_was_learned(train, tmp_path):
    run = train()
    result = merge(run, tmp_path / "out", "bf16")
    exact = tmp_path / "exact"
    merge(run, exact, "float32")
    base = load_file(resolve_base(make_plan(_lock(run)).recipe.model).path / "model.safetensors")
    stored, wanted = load_file(tmp_path / "out/model.safetensors"), load_file(exact / "model.safetensors")
    survived = learned = 0.0
    for name in [name for name in base if "proj" in name]:
        delta = wanted[name].double() - base[name].double()
        survived += float(((stored[name].double() - base[name].double()) * delta).sum())
        learned += float((delta * delta).sum())
    assert result.kept["bf16"] == pytest.approx(survived / learned, rel=1e-4)


def _lock(run: Path):
    import tomllib

    return tomllib.loads((run / "recipe.lock.toml").read_text())


def test_the_folder_is_plain_and_readable_by_others(train, tmp_path):
    out = tmp_path / "out"
    merge(train(**{"model.quantization": "nf4"}), out, "bf16")
    config = json.loads((out / "config.json").read_text())
    assert "quantization_config" not in config
    assert config["dtype"] == "bfloat16"
    assert {tensor.dtype for tensor in load_file(out / "model.safetensors").values()} == {torch.bfloat16}
    assert all(file.stat().st_mode & 0o044 == 0o044 for file in out.iterdir())
    assert not list(out.glob("adapter*"))


def test_the_exported_tokenizer_renders_as_training_did(train, make_base, tmp_path):
    from transformers import AutoTokenizer

    out = tmp_path / "out"
    merge(train(), out, "bf16")
    mine, theirs = AutoTokenizer.from_pretrained(out), AutoTokenizer.from_pretrained(make_base())
    for number in range(50):
        chat = [{"role": "user", "content": f"question {number}?"}, {"role": "assistant", "content": "yes " * number}]
        assert mine.apply_chat_template(chat) == theirs.apply_chat_template(chat)
    assert mine.eos_token_id == theirs.eos_token_id


def _flip_last_byte(run: Path, base: Path) -> None:
    file = base / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


def _edit_adapter(change: Callable[[dict[str, torch.Tensor]], None]) -> Callable[[Path, Path], None]:
    def edit(run: Path, base: Path) -> None:
        file = run / "adapter/adapter_model.safetensors"
        tensors = load_file(file)
        change(tensors)
        save_file(tensors, file)

    return edit


def _poison(tensors: dict[str, torch.Tensor]) -> None:
    tensors[min(tensors)][0, 0] = torch.nan


def _zero(tensors: dict[str, torch.Tensor]) -> None:
    for name in tensors:
        if "lora_B" in name:
            tensors[name].zero_()


def _drop_one(tensors: dict[str, torch.Tensor]) -> None:
    tensors.pop(next(name for name in tensors if "lora_B" in name))


def _add_foreign(tensors: dict[str, torch.Tensor]) -> None:
    for side, shape in (("A", (4, 64)), ("B", (64, 4))):
        tensors[f"base_model.model.model.layers.9.self_attn.q_proj.lora_{side}.weight"] = torch.ones(shape)


DAMAGES = {
    "another base": (_flip_last_byte, MergeError, "SHA-256 differs"),
    "base gone": (lambda run, base: shutil.rmtree(base), MergeError, "is gone"),
    "no run": (lambda run, base: (run / "run.json").unlink(), RecipeError, "no run of qpref"),
    "not finished": (lambda run, base: shutil.rmtree(run / "adapter"), RecipeError, "not finished"),
    "nan": (_edit_adapter(_poison), MergeError, "not finite"),
    "all zero": (_edit_adapter(_zero), MergeError, "nothing was learned"),
    "half a pair": (_edit_adapter(_drop_one), MergeError, "is half"),
    "a layer too many": (_edit_adapter(_add_foreign), MergeError, "holds no weight for model.layers.9"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_merge_that_cannot_be_right_is_refused_before_the_first_byte(train, make_base, tmp_path, damage):
    harm, error, words = DAMAGES[damage]
    base = tmp_path / "base"
    shutil.copytree(make_base(), base)
    run = train(base)
    harm(run, base)
    with pytest.raises(error, match=words):
        merge(run, tmp_path / "merged/out", "float32")
    assert not (tmp_path / "merged").exists()


def test_a_folder_that_holds_something_is_left_alone(train, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    with pytest.raises(RecipeError, match="holds something"):
        merge(train(), out)
    assert [file.name for file in out.iterdir()] == ["notes.txt"]


def test_a_full_disk_is_told_before_the_first_byte(train, tmp_path, monkeypatch):
    run = train()
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 1000))
    with pytest.raises(DiskError, match="needs"):
        merge(run, tmp_path / "merged/out", "bf16")
    assert not (tmp_path / "merged").exists()


def test_float16_is_refused_for_a_weight_beyond_its_range(train, make_base, tmp_path):
    base = tmp_path / "large"
    shutil.copytree(make_base(), base)
    tensors = load_file(base / "model.safetensors")
    tensors["model.embed_tokens.weight"][300, 0] = 1e6
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    run = train(base)
    with pytest.raises(MergeError, match="doesn't fit float16"):
        merge(run, tmp_path / "out", "fp16")
    assert merge(run, tmp_path / "auto").dtype != "fp16"
