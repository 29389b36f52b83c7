"""A merge that cannot be right is refused before its first byte, and says why."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from edited_runs import edit_facts, reseal
from merge_cases import merge, moved
from safetensors.torch import load_file, save_file

from qpref.errors import DataError, DiskError, MergeError, PolicyError, RecipeError
from qpref.evaluation.subjects import identify
from qpref.merging.guards import read_run
from qpref.merging.merge import merge_run, weights_of
from qpref.merging.replayed_pairs import choose_pairs
from qpref.merging.request import MergeRequest, Tolerance

Harm = Callable[[Path, Path], None]


def _edit_tensors(file: str, change: Callable[[dict[str, torch.Tensor]], None]) -> Harm:
    def edit(run: Path, base: Path) -> None:
        path = (run if file.startswith("adapter") else base) / file
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path, {"format": "pt"})

    return edit


def _edit_json(file: str, **changes) -> Harm:
    def edit(run: Path, base: Path) -> None:
        path = (run if file.startswith(("adapter", "run")) else base) / file
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return edit


def _replace(file: str, old: str, new: str) -> Harm:
    def edit(run: Path, base: Path) -> None:
        path = (run if file.startswith(("adapter", "recipe")) else base) / file
        assert old in path.read_text()
        path.write_text(path.read_text().replace(old, new))

    return edit


def _flip_last_byte(run: Path, base: Path) -> None:
    file = base / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


def _shuffle_weights(tensors: dict[str, torch.Tensor]) -> None:
    generator = torch.Generator().manual_seed(5)
    for name, tensor in tensors.items():
        tensors[name] = torch.randn(tensor.shape, generator=generator) * 0.02


def _lose_a_shard(run: Path, base: Path) -> None:
    weight_map = dict.fromkeys(load_file(base / "model.safetensors"), "model-00001-of-00002.safetensors")
    weight_map |= {"lm_head.weight": "model-00002-of-00002.safetensors"}
    (base / "model.safetensors").rename(base / "model-00001-of-00002.safetensors")
    (base / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def _forget_the_config(run: Path, base: Path) -> None:
    facts = json.loads((run / "run.json").read_text())
    del facts["base_config"]
    (run / "run.json").write_text(json.dumps(facts))


def _resize_vocabulary(run: Path, base: Path) -> None:
    _edit_json("config.json", vocab_size=384)(run, base)


def _poison(value: float) -> Callable[[dict[str, torch.Tensor]], None]:
    def edit(tensors: dict[str, torch.Tensor]) -> None:
        tensors[min(tensors)][0, 0] = value

    return edit


def _zero(tensors: dict[str, torch.Tensor]) -> None:
    for name in tensors:
        if "lora_B" in name:
            tensors[name].zero_()


def _drop(ending: str) -> Callable[[dict[str, torch.Tensor]], None]:
    def edit(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if ending in name]:
            del tensors[name]

    return edit


def _add(module: str, width: int = 64) -> Callable[[dict[str, torch.Tensor]], None]:
    def edit(tensors: dict[str, torch.Tensor]) -> None:
        tensors[f"base_model.model.{module}.lora_A.weight"] = torch.ones(4, width)
        tensors[f"base_model.model.{module}.lora_B.weight"] = torch.ones(64, 4)

    return edit


def _add_a_bias(tensors: dict[str, torch.Tensor]) -> None:
    tensors["base_model.model.model.layers.0.self_attn.q_proj.bias"] = torch.ones(64)


ADAPTER = "adapter/adapter_model.safetensors"
CONFIG = "adapter/adapter_config.json"
SECOND_Q = "model.layers.1.self_attn.q_proj"

DAMAGES: dict[str, tuple[Harm, type[Exception], str]] = {
    "another base of the same shape": (
        _edit_tensors("model.safetensors", _shuffle_weights), MergeError, "model.safetensors: .* SHA-256 differs"),
    "one flipped byte of the base": (_flip_last_byte, MergeError, "SHA-256 differs"),
    "base gone": (lambda run, base: shutil.rmtree(base), MergeError, "is gone"),
    "shard missing": (_lose_a_shard, PolicyError, "model-00002-of-00002.safetensors: no such file"),
    "shard missing and unnamed": (
        lambda run, base: _edit_json("run.json", base_weights={"gone.safetensors": "0" * 64} | json.loads(
            (run / "run.json").read_text())["base_weights"])(run, base), MergeError, "the index doesn't name it"),
    "vocabulary resized": (_resize_vocabulary, MergeError, "config.json: is not the one"),
    "another quantization in the base's config": (
        _edit_json("config.json", quantization_config={"load_in_4bit": True}), MergeError, "config.json: is not the"),
    "the base's generation settings changed": (
        _edit_json("generation_config.json", eos_token_id=[257]), MergeError, "generation_config.json: is not the one"),
    "config never noted": (_forget_the_config, MergeError, "no hash of the base's config"),
    "a 4-bit layer that the base doesn't have": (
        lambda run, base: edit_facts(run, quantized_modules=["model.layers.0.self_attn.k_prok"]),
        MergeError, "k_prok is no layer of the base"),
    "another compute type than the recipe's": (
        lambda run, base: edit_facts(run, dtype="bf16"), MergeError, "dtype is bf16, but the recipe's is float32"),
    "another double quantization than the recipe's": (
        lambda run, base: edit_facts(run, double_quantization=False), MergeError, "double_quantization is False, but"),
    "no run": (lambda run, base: (run / "run.json").unlink(), RecipeError, "no run of qpref"),
    "not finished": (lambda run, base: shutil.rmtree(run / "adapter"), RecipeError, "not finished"),
    "no recipe": (lambda run, base: (run / "recipe.lock.toml").unlink(), MergeError, "recipe.lock.toml: cannot be"),
    "another base in the recipe": (
        _replace("recipe.lock.toml", 'base = "', 'base = "other'), MergeError, "not the recipe of this run"),
    "another revision": (
        _replace("recipe.lock.toml", "[model]", '[model]\nrevision = "abc"'), MergeError, "not the recipe"),
    "another quantization": (
        _replace("recipe.lock.toml", 'quantization = "nf4"', 'quantization = "none"'), MergeError, "not the recipe"),
    "another double quantization": (
        _replace("recipe.lock.toml", "double_quantization = true", "double_quantization = false"),
        MergeError, "not the recipe"),
    "another compute type": (
        _replace("recipe.lock.toml", 'dtype = "float32"', 'dtype = "bf16"'), MergeError, "not the recipe"),
    "run's chat template changed": (
        _replace("adapter/chat_template.jinja", "assistant", "helper"), MergeError, "chat template differs from"),
    "base's chat template changed": (
        _replace("chat_template.jinja", "assistant", "helper"), MergeError, "chat template differs from"),
    "run's tokenizer changed": (
        _replace("adapter/tokenizer.json", '"!": ', '"!!": '), MergeError, "tokenizer differs from"),
    "base's tokenizer splits otherwise": (
        _replace("tokenizer.json", '"add_prefix_space": false', '"add_prefix_space": true'),
        MergeError, "tokenizer differs from"),
    "another end token": (
        _edit_json("tokenizer_config.json", eos_token="<|endoftext|>"), MergeError, "tokenizer differs from"),
    "tokenizer lost": (
        lambda run, base: (run / "adapter/tokenizer.json").unlink(), MergeError, "tokenizer can't be loaded"),
    "adapter of another base": (
        _edit_json(CONFIG, base_model_name_or_path="org/other"), MergeError, "an adapter of org/other"),
    "another scaling": (_edit_json(CONFIG, lora_alpha=16), MergeError, "lora_alpha is 16, but the run's"),
    "another rank": (_edit_json(CONFIG, r=8), MergeError, "r is 8, but the run's"),
    "DoRA": (_edit_json(CONFIG, use_dora=True), MergeError, "use_dora"),
    "adapter unreadable": (
        lambda run, base: (run / ADAPTER).write_bytes(b"{}"), MergeError, "PEFT's format with safetensors"),
    "adapter settings unreadable": (
        lambda run, base: (run / CONFIG).write_text("{"), MergeError, "no adapter in PEFT's format"),
    "NaN in the adapter": (_edit_tensors(ADAPTER, _poison(torch.nan)), MergeError, "not finite"),
    "infinity in the adapter": (_edit_tensors(ADAPTER, _poison(torch.inf)), MergeError, "not finite"),
    "nothing learned": (_edit_tensors(ADAPTER, _zero), MergeError, "nothing was learned"),
    "half a pair": (_edit_tensors(ADAPTER, _drop(f"{SECOND_Q}.lora_B")), MergeError, f"{SECOND_Q} lacks its B matrix"),
    "the other half": (_edit_tensors(ADAPTER, _drop(f"{SECOND_Q}.lora_A")), MergeError, "more than LoRA matrices"),
    "a layer missing": (_edit_tensors(ADAPTER, _drop(SECOND_Q)), MergeError, f"no matrices for its target {SECOND_Q}"),
    "a layer too many": (
        _edit_tensors(ADAPTER, _add("model.layers.9.self_attn.q_proj")), MergeError, "no weight for model.layers.9"),
    "a layer that is no target": (_edit_tensors(ADAPTER, _add("lm_head")), MergeError, "lm_head, which is not one"),
    "a bias": (_edit_tensors(ADAPTER, _add_a_bias), MergeError, "more than LoRA matrices"),
    "another shape": (_edit_tensors(ADAPTER, _add(SECOND_Q, width=32)), MergeError, r"\(64, 32\), the base's weight"),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_merge_that_cannot_be_right_is_refused_before_the_first_byte(trained_run, make_base, tmp_path, damage):
    harm, error, words = DAMAGES[damage]
    run, base = moved(trained_run(make_base(), **{"model.quantization": "nf4"}), make_base(), tmp_path)
    harm(run, base)
    if (run / "run.json").is_file():
        reseal(run)
    with pytest.raises(error, match=words):
        merge(run, tmp_path / "merged/out", "float32")
    assert not (tmp_path / "merged").exists()


def test_a_base_damaged_under_its_cached_hash_is_refused(trained_run, make_base, tmp_path):
    """A disk changes neither the size nor the time of a file that it damages; the verdict would compare two models of
    the same damaged weights."""
    run, base = moved(trained_run(make_base(), **{"model.quantization": "nf4"}), make_base(), tmp_path)
    read_run(run)
    identify(str(run))  # caches the hashes
    times = (base / "model.safetensors").stat()
    with (base / "model.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        last = file.read(1)[0]
        file.seek(-1, 2)
        file.write(bytes([last ^ 1]))
    os.utime(base / "model.safetensors", ns=(times.st_atime_ns, times.st_mtime_ns))
    with pytest.raises(MergeError, match=r"model\.safetensors: not the file used in training; its SHA-256 differs"):
        read_run(run)


def test_an_unharmed_copy_of_that_run_is_merged(trained_run, make_base, tmp_path):
    run, _ = moved(trained_run(make_base(), **{"model.quantization": "nf4"}), make_base(), tmp_path)
    assert merge(run, tmp_path / "merged/out", "float32").verdict.passed


def test_pairs_that_are_gone_are_told_before_the_first_byte(trained_run, make_base, tmp_path):
    run, _ = moved(trained_run(), make_base(), tmp_path)
    held = json.dumps(str(trained_run().parent / "heldout.jsonl"))
    _replace("recipe.lock.toml", held, '"/nowhere/heldout.jsonl"')(run, run)
    reseal(run)
    with pytest.raises(DataError, match=r"heldout\.jsonl: no such file"):
        merge(run, tmp_path / "merged/out")
    assert not (tmp_path / "merged").exists()


def test_held_out_pairs_alone_are_read_where_they_have_a_file_of_their_own(trained_run, make_base, tmp_path):
    """The training data may be gone, and no validator looks at them."""
    run, _ = moved(trained_run(), make_base(), tmp_path)
    train = json.dumps(str(trained_run().parent / "train.jsonl"))
    _replace("recipe.lock.toml", train, '"/nowhere/train.jsonl"')(run, run)
    reseal(run)
    opened = read_run(run)
    replayed = choose_pairs(opened.plan, opened.base_folder, opened.tokenizer, 64)
    assert (len(replayed.contrasts), replayed.origin) == (4, "held-out pairs")


def test_a_folder_that_is_not_empty_is_left_alone(trained_run, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    with pytest.raises(RecipeError, match="is not empty"):
        merge(trained_run(), out)
    assert [file.name for file in out.iterdir()] == ["notes.txt"]


def test_an_empty_folder_is_filled(trained_run, tmp_path):
    (tmp_path / "out").mkdir()
    merge(trained_run(), tmp_path / "out", "bf16")
    assert (tmp_path / "out/model.safetensors").is_file()


@pytest.mark.parametrize("kind", ["the current folder", "a link to an empty folder", "a dangling link"])
def test_an_output_folder_may_be_a_link_or_the_current_folder(trained_run, tmp_path, monkeypatch, kind):
    real, link = tmp_path / "real", tmp_path / "link"
    link.symlink_to(real)
    if kind != "a dangling link":
        real.mkdir()
    if kind == "the current folder":
        monkeypatch.chdir(real)
    result = merge(trained_run(), Path() if kind == "the current folder" else link, "bf16")
    assert (real / "model.safetensors").is_file()
    assert (real / "README.md").read_text().count("# real\n") == 1
    assert link.is_symlink()
    assert result.path == real


def test_a_folder_that_cannot_be_made_is_refused_before_the_run_is_read(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DiskError, match="cannot be written"):
        merge(tmp_path / "no-run", tmp_path / "file/deep/out")
    with pytest.raises(DiskError, match="File name too long"):
        merge(tmp_path / "no-run", tmp_path / "new/deep" / ("x" * 250))
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_mount_point_is_refused(tmp_path):
    with pytest.raises(RecipeError, match="mount point"):
        merge(tmp_path / "no-run", Path("/"))


def test_a_folder_inside_the_run_is_refused(trained_run, make_base, tmp_path):
    run, _ = moved(trained_run(), make_base(), tmp_path)
    with pytest.raises(RecipeError, match="inside the run"):
        merge(run, run / "merged")
    assert not (run / "merged").exists()


@pytest.mark.parametrize("dtype", ["auto", "bf16"])
def test_a_full_disk_is_told_before_the_first_byte(trained_run, tmp_path, monkeypatch, dtype):
    run = trained_run()
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 1000))
    with pytest.raises(DiskError, match="needs"):
        merge(run, tmp_path / "merged/out", dtype)
    assert not (tmp_path / "merged").exists()


def test_a_type_that_was_tried_takes_no_room_from_the_next(trained_run, make_base, tmp_path, monkeypatch):
    run = trained_run(make_base(), **{"model.quantization": "nf4"})
    error = merge(run, tmp_path / "bf16", "bf16").verdict.margin_error
    one_model = (tmp_path / "bf16/model.safetensors").stat().st_size

    def usage(path: Path) -> tuple[int, int, int]:
        staged = sum(file.stat().st_size for file in tmp_path.glob(".tmp-out-*/model*"))
        return shutil._ntuple_diskusage(10**9, staged, one_model - staged)

    monkeypatch.setattr(shutil, "disk_usage", usage)
    assert merge(run, tmp_path / "out", tolerance=Tolerance(nats=error / 2)).dtype == "fp16"


def test_a_disk_that_fills_on_the_way_is_told_with_the_folder_that_was_asked_for(trained_run, tmp_path, monkeypatch):
    free, out = iter([10**9, 0]), tmp_path / "out"
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 0, next(free)))
    with pytest.raises(DiskError, match=f"^{re.escape(str(out))}: needs"):
        merge(trained_run(), out, "bf16")


@pytest.mark.parametrize(("quantize", "slack"), [(None, 1.01), ("nf4", 1.4)])
def test_the_room_that_is_asked_for_is_what_is_written(trained_run, make_base, tmp_path, quantize, slack):
    request = MergeRequest(
        run=trained_run(make_base(), **{"model.quantization": "nf4"}),
        out=tmp_path / "out",
        dtype="bf16",
        quantize=quantize,
    )
    asked = weights_of(read_run(request.run), request, torch.bfloat16).num_bytes
    merge_run(request)
    tensors = load_file(tmp_path / "out/model.safetensors").values()
    written = sum(tensor.nbytes for tensor in tensors)
    assert written <= asked < written * slack


def test_nothing_is_visible_under_the_name_until_all_is_written(trained_run, tmp_path, monkeypatch):
    from qpref.merging import merge as module

    def fail(*arguments):
        assert not (tmp_path / "out").exists()
        raise MergeError("as if the card couldn't be written")

    monkeypatch.setattr(module, "write_card", fail)
    with pytest.raises(MergeError, match="as if"):
        merge(trained_run(), tmp_path / "out", "bf16")
    assert list(tmp_path.glob("*out*")) == []


def test_an_original_that_is_4_bit_already_is_refused(trained_run, make_base, tmp_path):
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    base = tmp_path / "prequantized"
    shutil.copytree(make_base(), base)
    (base / "model.safetensors").unlink()
    quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype="float32")
    AutoModelForCausalLM.from_pretrained(
        make_base(), quantization_config=quantization, dtype=torch.float32
    ).save_pretrained(base)
    run = trained_run(base, **{"model.quantization": "nf4"})
    with pytest.raises(RecipeError, match="only 4-bit weights, no original ones"):
        merge(run, tmp_path / "merged/out", onto="original")
    assert not (tmp_path / "merged").exists()


def test_float16_is_refused_for_a_weight_beyond_its_range(trained_run, make_base, tmp_path):
    base = tmp_path / "large"
    shutil.copytree(make_base(), base)
    tensors = load_file(base / "model.safetensors")
    tensors["model.embed_tokens.weight"][300, 0] = 1e6
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    run = trained_run(base)
    with pytest.raises(MergeError, match="doesn't fit float16"):
        merge(run, tmp_path / "merged/out", "fp16")
    assert not (tmp_path / "merged").exists()
