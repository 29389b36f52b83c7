"""What stands beside the weights: byte for byte the base's, and readable by transformers 4.57 as well as 5."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import make_tokenizer
from merge_cases import load_plain, logits_of, merge
from safetensors.torch import load_file

from qpref.errors import MergeError
from qpref.merging import merge as merge_module
from qpref.merging.settings import patched_config, patched_tokenizer_config

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 128,
}
TWO_ROPES = {
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
    "sliding_attention": {"rope_type": "default", "rope_theta": 5000.0},
}
BASES = {
    "llama": ("llama", {"rope_parameters": LLAMA3}),
    "tied": ("qwen", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}),
    "two kinds of attention": ("gemma3", {"rope_parameters": TWO_ROPES}),
}


def test_the_folder_is_plain_and_readable_by_others(trained_run, make_base, tmp_path):
    out = tmp_path / "out"
    merge(trained_run(make_base(), **{"model.quantization": "nf4"}), out, "bf16")
    config = json.loads((out / "config.json").read_text())
    assert "quantization_config" not in config
    assert config["dtype"] == config["torch_dtype"] == "bfloat16"
    assert {tensor.dtype for tensor in load_file(out / "model.safetensors").values()} == {torch.bfloat16}
    assert all(file.stat().st_mode & 0o044 == 0o044 for file in (out, *out.iterdir()))
    assert sorted(file.name for file in out.iterdir()) == [
        "README.md", "chat_template.jinja", "config.json", "generation_config.json", "merge.json", "model.safetensors",
        "tokenizer.json", "tokenizer_config.json",
    ]  # fmt: skip


def test_tokenizer_template_and_generation_settings_are_the_bases_own_bytes(trained_run, make_base, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(make_base(), base)
    # As no library would write them.
    for name in ("tokenizer.json", "generation_config.json"):
        (base / name).write_text(json.dumps(json.loads((base / name).read_text()), indent=7))
    (base / "LICENSE").write_text("as you like")
    merge(trained_run(base), tmp_path / "out", "bf16")
    for name in ("tokenizer.json", "generation_config.json", "chat_template.jinja", "LICENSE"):
        assert (tmp_path / "out" / name).read_bytes() == (base / name).read_bytes(), name


def test_the_recipes_own_tokenizer_is_the_one_that_is_exported(trained_run, make_base, tmp_path):
    own = tmp_path / "tokenizer"
    make_tokenizer("{% for message in messages %}<|im_start|>{{ message['content'] }}<|im_end|>{% endfor %}"
                   "{% if add_generation_prompt %}<|im_start|>{% endif %}").save_pretrained(own)  # fmt: skip
    run = trained_run(make_base(), **{"model.tokenizer": str(own)})
    merge(run, tmp_path / "out", "bf16")
    assert (tmp_path / "out/chat_template.jinja").read_bytes() == (own / "chat_template.jinja").read_bytes()


def test_the_exported_tokenizer_renders_as_training_did(trained_run, make_base, tmp_path):
    from transformers import AutoTokenizer

    out = tmp_path / "out"
    merge(trained_run(), out, "bf16")
    mine, theirs = AutoTokenizer.from_pretrained(out), AutoTokenizer.from_pretrained(make_base())
    for number in range(50):
        chat = [{"role": "user", "content": f"question {number}?"}, {"role": "assistant", "content": "yes " * number}]
        assert mine.apply_chat_template(chat) == theirs.apply_chat_template(chat)
    assert mine.eos_token_id == theirs.eos_token_id


def test_a_tokenizer_that_comes_out_otherwise_is_refused(trained_run, tmp_path, monkeypatch):
    write = merge_module.write_settings

    def with_a_slip(base, tokenizer, folder, dtype, packed):
        write(base, tokenizer, folder, dtype, packed)
        file = folder / "tokenizer.json"
        file.write_text(file.read_text().replace('"add_prefix_space": false', '"add_prefix_space": true'))

    monkeypatch.setattr(merge_module, "write_settings", with_a_slip)
    with pytest.raises(MergeError, match="tokenizer would differ from the one"):
        merge(trained_run(), tmp_path / "out", "bf16")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", BASES)
def test_the_older_words_change_nothing_for_transformers_5(make_base, tmp_path, name):
    from transformers import AutoConfig

    family, changes = BASES[name]
    base = make_base(family, **changes)
    values = json.loads((base / "config.json").read_text())
    patched = patched_config(values, torch.float32)
    assert (
        patched["rope_theta"]
        == (values["rope_parameters"].get("full_attention", values["rope_parameters"]))["rope_theta"]
    )
    (tmp_path / "config.json").write_text(json.dumps(patched))
    mine, theirs = AutoConfig.from_pretrained(tmp_path), AutoConfig.from_pretrained(base)
    assert mine.rope_parameters == theirs.rope_parameters
    assert mine.dtype == theirs.dtype == torch.float32


def test_a_config_in_the_older_words_stays_as_it_is():
    old = {"rope_theta": 5e5, "rope_scaling": {"rope_type": "yarn", "factor": 4.0}, "torch_dtype": "float32"}
    assert patched_config(old, torch.bfloat16) == old | {"dtype": "bfloat16", "torch_dtype": "bfloat16"}


def test_a_text_config_inside_is_patched_too():
    inner = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}, "dtype": "float32"}
    patched = patched_config({"text_config": inner, "quantization_config": {}}, torch.float16)
    assert patched["text_config"]["rope_theta"] == 1e6
    assert patched["text_config"]["dtype"] == patched["dtype"] == "float16"
    assert "quantization_config" not in patched


def test_a_tokenizer_config_gets_a_class_and_special_tokens_that_4_57_knows():
    config = {"tokenizer_class": "TokenizersBackend", "backend": "tokenizers", "extra_special_tokens": ["<|tool|>"]}
    assert patched_tokenizer_config(config) == {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "additional_special_tokens": ["<|tool|>"],
    }
    old = {"tokenizer_class": "GemmaTokenizerFast", "extra_special_tokens": {"image_token": "<image>"}}
    assert patched_tokenizer_config(old) == old


READ_BACK = """
import json, sys, torch, transformers
from transformers import AutoModelForCausalLM, AutoTokenizer
model, report = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32, output_loading_info=True)
assert not report["missing_keys"] and not report["unexpected_keys"], report
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
text = tokenizer.apply_chat_template([{"role": "user", "content": "What is 12 + 345?"}], tokenize=False)
torch.set_num_threads(1)
with torch.no_grad():
    logits = model(torch.arange(20, 60)[None], use_cache=False).logits[0]
print(json.dumps({"version": transformers.__version__, "ids": tokenizer(text)["input_ids"], "logits": logits.tolist(),
                  "special": tokenizer.all_special_tokens}))
"""


@pytest.fixture(scope="session")
def transformers_4_57(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("transformers-4.57")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--target", str(folder), "transformers>=4.57,<4.58"]
    subprocess.run(command, check=True)
    return folder


def _read_back(out: Path, **environment: str) -> dict:
    done = subprocess.run(
        [sys.executable, "-c", READ_BACK, str(out)],
        env=os.environ | environment, capture_output=True, text=True, check=True,
    )  # fmt: skip
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.soak
@pytest.mark.parametrize("name", BASES)
def test_transformers_4_57_and_5_read_the_same_model(trained_run, make_base, tmp_path, transformers_4_57, name):
    family, changes = BASES[name]
    base = tmp_path / "base"
    shutil.copytree(make_base(family, **changes), base)
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|tool|>"]})
    tokenizer.save_pretrained(base)
    out = tmp_path / "out"
    merge(trained_run(base, **{"model.quantization": "nf4"}), out)
    old, new = _read_back(out, PYTHONPATH=str(transformers_4_57)), _read_back(out)
    assert old["version"].startswith("4.57")
    assert new["version"].startswith("5.")
    assert old["ids"] == new["ids"]
    assert "<|tool|>" in set(old["special"]) & set(new["special"])
    difference = (torch.tensor(old["logits"]) - torch.tensor(new["logits"])).abs().max()
    assert difference < 1e-5
    assert (torch.tensor(new["logits"]) - logits_of(load_plain(out))).abs().max() < 1e-5
