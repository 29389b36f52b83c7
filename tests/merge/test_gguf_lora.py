"""`qpref export --lora`: the base's tensors in GGUF with the adapter's deltas are those of the merged model."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from gguf_files import gguf_tensors, write_gguf
from tiny_models import TinyModel

from qpref.cli import main
from qpref.errors import MergeError, RecipeError
from qpref.merging.gguf_lora import ARCHITECTURES, export_lora


def write_adapter(model, folder, **settings):
    """A PEFT adapter on all linear layers of the blocks whose matrices are random; returns the model with it."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(1)
    linear = {name.split(".")[-1] for name, module in model.named_modules() if type(module) is torch.nn.Linear}
    targets = sorted(linear - {"lm_head"})
    adapted = get_peft_model(model, LoraConfig(r=4, lora_alpha=6, target_modules=targets, **settings))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.2)
    adapted.save_pretrained(folder)
    return adapted


def read_gguf(path):
    """Fields and tensors of a GGUF file."""
    import gguf

    reader = gguf.GGUFReader(path)
    fields = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    return fields, {tensor.name: np.array(tensor.data) for tensor in reader.tensors}


@pytest.mark.parametrize("rslora", [False, True])
def test_base_and_adapter_in_gguf_are_the_merged_model(tmp_path, rslora):
    model = write_gguf(tmp_path / "base.gguf")
    adapted = write_adapter(model, tmp_path / "adapter", use_rslora=rslora)
    export_lora(tmp_path / "adapter", model.config.to_dict(), tmp_path / "lora.gguf")
    fields, lora = read_gguf(tmp_path / "lora.gguf")
    assert fields["general.type"] == "adapter"
    assert fields["general.architecture"] == "llama"
    assert fields["adapter.type"] == "lora"
    _, base = read_gguf(tmp_path / "base.gguf")
    merged = gguf_tensors(adapted.merge_and_unload())
    changed = {name.removesuffix(".lora_a") for name in lora if name.endswith(".lora_a")}
    assert len(lora) == 2 * len(changed) == 2 * 7 * model.config.num_hidden_layers
    for name in changed:
        down, up = lora[f"{name}.lora_a"], lora[f"{name}.lora_b"]
        scale = fields["adapter.lora.alpha"] / up.shape[1]  # as llama.cpp scales it
        np.testing.assert_allclose(base[name] + scale * up @ down, merged[name], atol=1e-5)
        assert np.abs(merged[name] - base[name]).max() > 0.1


@pytest.mark.parametrize("kind", sorted(ARCHITECTURES))
def test_every_linear_layer_of_a_known_architecture_has_its_name(tmp_path, kind):
    """With the experts' fused weights and the router left out, which a LoRA of linear layers doesn't reach."""
    model = TinyModel(model_type=kind).make()
    targets = {module.out_features for module in model.modules() if type(module) is torch.nn.Linear}
    adapted = write_adapter(model, tmp_path / "adapter")
    out = export_lora(tmp_path / "adapter", model.config.to_dict(), tmp_path / "lora.gguf")
    fields, tensors = read_gguf(out)
    assert fields["general.architecture"] == ARCHITECTURES[kind]
    assert len(tensors) == sum("lora_" in name for name, _ in adapted.named_parameters())
    assert all(name.startswith("blk.") for name in tensors)
    assert targets >= {len(values) for name, values in tensors.items() if name.endswith("lora_b")}


def test_what_ggufs_lora_does_not_have_is_refused_by_name(tmp_path):
    model = TinyModel(model_type="llama").make()
    config = model.config.to_dict()
    write_adapter(model, tmp_path / "adapter", alpha_pattern={"q_proj": 2})
    with pytest.raises(MergeError, match="uses alpha_pattern"):
        export_lora(tmp_path / "adapter", config, tmp_path / "lora.gguf")
    with pytest.raises(MergeError, match="no GGUF names are known here for mamba models"):
        export_lora(tmp_path / "adapter", config | {"model_type": "mamba"}, tmp_path / "lora.gguf")
    (tmp_path / "lora.gguf").write_text("")
    with pytest.raises(RecipeError, match="exists already"):
        export_lora(tmp_path / "adapter", config, tmp_path / "lora.gguf")


def export(*arguments, code=0):
    done = CliRunner().invoke(main, ["export", *map(str, arguments)], catch_exceptions=False)
    assert done.exit_code == code, done.output
    return done


def test_a_run_and_its_adapter_alone_are_exported_alike(trained_run, make_base, tmp_path):
    run = trained_run()
    export(run, tmp_path / "run.gguf", "--lora")
    adapter = shutil.copytree(run / "adapter", tmp_path / "adapter")
    export(adapter, tmp_path / "adapter.gguf", "--lora", "--base", make_base())
    assert (tmp_path / "run.gguf").read_bytes() == (tmp_path / "adapter.gguf").read_bytes()


def test_a_model_without_an_adapter_is_refused(make_base, tmp_path):
    done = export(make_base(), tmp_path / "lora.gguf", "--lora", code=2)
    assert f"{make_base()}: a model, which has no adapter in PEFT's format" in done.stderr


ASK = """
import json, sys
import xllamacpp
base, lora, ids = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
params = xllamacpp.CommonParams()
params.model.path, params.n_ctx, params.warmup, params.cpuparams.n_threads = base, 128, False, 1
if lora:
    adapter = xllamacpp.CommonAdapterLoraInfo()
    adapter.path, adapter.scale = lora, 1.0
    params.lora_adapters = [adapter]
asked = {"prompt": ids, "n_predict": 1, "n_probs": 320, "temperature": 0.0}
answer = xllamacpp.Server(params).handle_completions(asked)
answer = answer if isinstance(answer, dict) else json.loads(answer)
listed = answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
print("ANSWER", json.dumps({one["id"]: one["logprob"] for one in listed}))
"""
"""Log-probabilities of the next token by llama.cpp, from its Python binding."""


@pytest.mark.soak
def test_llama_cpp_computes_what_the_adapted_model_does(tmp_path):
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", tmp_path / "site"]
    subprocess.run([*pip, "xllamacpp==2026.10.11549"], check=True)
    ids = [1, 20, 35, 60, 44, 70, 71, 90]

    def by_llama_cpp(lora):
        command = [sys.executable, "-c", ASK, tmp_path / "base.gguf", lora, json.dumps(ids)]
        environment = os.environ | {"PYTHONPATH": str(tmp_path / "site")}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        answer = next(line for line in done.stdout.splitlines() if line.startswith("ANSWER "))
        found = {int(token): value for token, value in json.loads(answer.removeprefix("ANSWER ")).items()}
        return torch.tensor([found[token] for token in range(len(found))])

    @torch.no_grad()
    def by_transformers(model):
        return model(torch.tensor([ids])).logits[0, -1].log_softmax(-1)

    model = write_gguf(tmp_path / "base.gguf")
    plain = by_transformers(model)
    adapted = by_transformers(write_adapter(model, tmp_path / "adapter"))
    export_lora(tmp_path / "adapter", model.config.to_dict(), tmp_path / "lora.gguf")
    assert (adapted - plain).abs().max() > 0.2
    assert (by_llama_cpp("") - plain).abs().max() < 0.01  # its cache of keys and values is 16-bit
    assert (by_llama_cpp(tmp_path / "lora.gguf") - adapted).abs().max() < 0.01
