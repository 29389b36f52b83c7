"""Where a base comes from: what is refused before transformers sees it, wheels, GGUF conversion, quantized folders."""

from __future__ import annotations

import hashlib
import io
import json
import logging
import os
import shutil
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import make_tokenizer
from gguf_files import write_gguf
from safetensors.torch import load_file, save_file

from qpref import publish, pypi
from qpref.errors import PolicyError
from qpref.policy import convert, source
from qpref.policy.load import load_policy
from qpref.policy.source import BaseFolder, resolve_base
from qpref.policy.tokenizer import load_tokenizer, stop_tokens
from qpref.recipe.sections import ModelSection, Recipe


def section(base: object, **settings: object) -> ModelSection:
    return ModelSection.model_validate({"base": str(base)} | settings)


def resolve(base: object, **settings: object) -> BaseFolder:
    return resolve_base(section(base, **settings))


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    """An empty cache for every test."""
    monkeypatch.setenv("QPREF_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def folder(make_base, tmp_path) -> Path:
    """A base of its own to spoil."""
    return Path(shutil.copytree(make_base(), tmp_path / "base"))


def change_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def split_into_shards(folder: Path, *names: str) -> None:
    """Put every tensor into the first named file, and let the index name them all in turn."""
    whole = folder / "model.safetensors"
    weight_map = {key: names[place % len(names)] for place, key in enumerate(load_file(whole))}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    whole.rename(folder / names[0])


def test_a_folder_is_taken_as_it_is(folder):
    found = resolve(folder)
    assert found.path == folder
    digest = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    assert found.weights == {"model.safetensors": digest}


def test_an_indexs_shards_are_its_weights(folder):
    split_into_shards(folder, "a.safetensors", "b.safetensors")
    shutil.copy(folder / "a.safetensors", folder / "b.safetensors")
    assert list(resolve(folder).weights) == ["a.safetensors", "b.safetensors"]


def test_changed_weights_have_another_hash(folder):
    before = resolve(folder).weights
    data = bytearray((folder / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (folder / "model.safetensors").write_bytes(data)
    assert resolve(folder).weights != before


def test_pickled_weights_are_refused_with_the_way_out(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(PolicyError) as caught:
        resolve(folder)
    assert caught.value.what == f"{folder}/model.safetensors: no such file"
    assert caught.value.hint == "pytorch_model.bin is a pickle, which can run code; convert it to safetensors"


def test_a_missing_shard_is_named(folder):
    split_into_shards(folder, "a.safetensors", "b.safetensors")
    with pytest.raises(PolicyError, match=r"b\.safetensors: no such file"):
        resolve(folder)


@pytest.mark.parametrize("outside", ["../model.safetensors", "/etc/passwd", "sub/model.safetensors"])
def test_an_index_that_leads_out_of_its_folder_is_refused(outside, folder):
    split_into_shards(folder, "a.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": outside}}))
    with pytest.raises(PolicyError, match="names a file outside its folder"):
        resolve(folder)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"weight_map": 3}'])
def test_an_index_that_is_none_is_refused(text, folder):
    (folder / "model.safetensors.index.json").write_text(text)
    with pytest.raises(PolicyError, match=r"index\.json: no index of safetensors files"):
        resolve(folder)


@pytest.mark.parametrize("key", ["auto_map", "custom_pipelines", "model_file"])
def test_a_base_with_code_of_its_own_is_refused(key, folder):
    change_config(folder, **{key: {"AutoModelForCausalLM": "evil.Model"}})
    with pytest.raises(PolicyError, match=f"'{key}' names code of the model's own, which qpref doesn't run"):
        resolve(folder)


def test_a_config_that_is_not_json_is_refused(folder):
    (folder / "config.json").write_text("{'model_type': 'llama'}")
    with pytest.raises(PolicyError, match=r"config\.json: not JSON"):
        resolve(folder)


def test_a_folder_without_a_config_is_refused(tmp_path):
    with pytest.raises(PolicyError, match=r"no config\.json, so no model folder"):
        resolve(tmp_path)


def test_a_missing_path_is_refused(tmp_path):
    with pytest.raises(PolicyError, match="no such model file or folder"):
        resolve(tmp_path / "nothing")


def test_a_file_of_another_kind_is_refused(folder):
    with pytest.raises(PolicyError, match=r"a base is a folder with safetensors or a \.gguf file"):
        resolve(folder / "model.safetensors")


def test_a_hash_for_a_folder_is_refused(folder):
    with pytest.raises(PolicyError, match=r"sha256 is for a \.gguf file; this is a folder"):
        resolve(folder, sha256="0" * 64)


def test_what_is_neither_a_path_nor_a_hub_id_is_refused():
    with pytest.raises(PolicyError, match="neither a path that exists nor a hub id"):
        resolve("some words//and slashes")


def test_a_hub_id_without_a_hub_is_refused_with_the_way_out():
    with pytest.raises(PolicyError, match="HF_HUB_OFFLINE is set, and this model isn't in the hub's cache") as caught:
        resolve("nobody/nothing-of-this-name")
    assert "name a local folder" in caught.value.hint


# Wheels


@pytest.fixture
def shelf(tmp_path, monkeypatch) -> Path:
    """A folder that is all of PyPI to pip."""
    folder = tmp_path / "shelf"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("PIP_DISABLE_PIP_VERSION_CHECK", "1")
    return folder


def put_wheel(shelf: Path, files: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> None:
    info = "tiny_base-1.0.dist-info"
    metadata = {
        f"{info}/METADATA": b"Metadata-Version: 2.1\nName: tiny-base\nVersion: 1.0\n",
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/RECORD": b"",
    }
    with zipfile.ZipFile(shelf / "tiny_base-1.0-py3-none-any.whl", "w", compression) as wheel:
        for name, data in (files | metadata).items():
            wheel.writestr(name, data)


def test_a_base_inside_a_wheel_is_converted(shelf, cache, tmp_path):
    write_gguf(tmp_path / "tiny.gguf")
    put_wheel(shelf, {"tiny_base/data/tiny.gguf": (tmp_path / "tiny.gguf").read_bytes()})
    found = resolve("pypi:tiny-base==1.0/tiny_base/data/tiny.gguf")
    assert (found.path / "model.safetensors").is_file()
    assert found.path.is_relative_to(cache)


def test_a_wheel_is_fetched_once(shelf, tmp_path):
    write_gguf(tmp_path / "tiny.gguf")
    put_wheel(shelf, {"tiny_base/tiny.gguf": (tmp_path / "tiny.gguf").read_bytes()})
    first = resolve("pypi:tiny-base==1.0/tiny_base/tiny.gguf")
    shutil.rmtree(shelf)
    assert resolve("pypi:tiny-base==1.0/tiny_base/tiny.gguf") == first


def test_nothing_of_a_wheel_is_kept_but_the_file(shelf, cache):
    put_wheel(shelf, {"tiny_base/tiny.txt": b"words", "tiny_base/__init__.py": b"raise SystemExit"})
    with pytest.raises(PolicyError, match=r"a base is a folder with safetensors or a \.gguf file"):
        resolve("pypi:tiny-base==1.0/tiny_base/tiny.txt")
    kept = [path.relative_to(cache) for path in cache.rglob("*") if path.is_file()]
    assert kept == [Path("pypi/tiny-base-1.0/tiny_base/tiny.txt")]


def test_a_file_that_the_wheel_does_not_hold_is_named(shelf, cache):
    put_wheel(shelf, {"tiny_base/tiny.gguf": b"GGUF"})
    with pytest.raises(PolicyError, match=r"tiny_base-1\.0-py3-none-any\.whl: holds no file tiny_base/other\.gguf"):
        resolve("pypi:tiny-base==1.0/tiny_base/other.gguf")
    assert not [path for path in cache.rglob("*") if path.is_file()]


def test_a_source_distribution_is_refused_and_never_run(shelf, tmp_path):
    setup = f"open({str(tmp_path / 'canary')!r}, 'w')\nfrom setuptools import setup\nsetup(name='tiny-base')\n".encode()
    with tarfile.open(shelf / "tiny-base-1.0.tar.gz", "w:gz") as archive:
        member = tarfile.TarInfo("tiny-base-1.0/setup.py")
        member.size = len(setup)
        archive.addfile(member, io.BytesIO(setup))
    with pytest.raises(PolicyError, match="cannot be fetched as a wheel: ERROR: No matching distribution"):
        resolve("pypi:tiny-base==1.0/tiny_base/tiny.gguf")
    assert not (tmp_path / "canary").exists()


@pytest.mark.parametrize("path", ["../tiny.gguf", "tiny_base/../../tiny.gguf", "/etc/passwd"])
def test_a_path_that_leads_out_of_the_wheel_is_refused(path, shelf):
    with pytest.raises(PolicyError, match="the path has to stay inside the wheel"):
        resolve(f"pypi:tiny-base==1.0/{path}")


@pytest.mark.parametrize("base", ["pypi:tiny-base/x.gguf", "pypi:--index-url==1/x", "pypi:tiny==1", "pypi:a b==1/x"])
def test_a_malformed_wheel_name_is_refused(base):
    with pytest.raises(PolicyError, match="expected pypi:<dist>==<version>/<path inside the wheel>"):
        resolve(base)


# GGUF


@pytest.fixture(scope="module")
def converted(tmp_path_factory) -> tuple[Path, object]:
    """A converted GGUF file's folder, and the model that was in the file."""
    folder = tmp_path_factory.mktemp("gguf")
    model = write_gguf(folder / "tiny.gguf")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QPREF_CACHE", str(folder / "cache"))
        return resolve(folder / "tiny.gguf").path, model


def test_a_converted_file_has_the_files_weights(converted):
    from transformers import AutoModelForCausalLM

    folder, model = converted
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    assert loaded.dtype == torch.bfloat16
    wanted = {name: tensor.bfloat16() for name, tensor in model.state_dict().items()}
    found = loaded.state_dict()
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())


def test_a_converted_tokenizer_splits_digits_one_by_one(converted):
    from transformers import AutoTokenizer

    words = AutoTokenizer.from_pretrained(converted[0]).tokenize("a 12 b12")
    assert words == ["a", "Ġ", "1", "2", "Ġ", "b", "1", "2"]


def test_a_converted_tokenizer_keeps_template_and_special_tokens(converted):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(converted[0])
    ids = tokenizer.apply_chat_template([{"role": "user", "content": "é"}], return_dict=False)
    assert tokenizer.decode(ids) == "<|im_start|>user\né<|im_end|>\n"
    assert (ids[0], ids.count(258)) == (257, 1)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (257, 258)


def test_a_converted_tokenizer_knows_the_models_length(converted):
    from transformers import AutoTokenizer

    assert AutoTokenizer.from_pretrained(converted[0]).model_max_length == 512


def test_a_converted_config_names_no_path(converted):
    text = (converted[0] / "config.json").read_text()
    assert "name_or_path" not in text
    assert "run 7" not in text


def test_a_file_is_converted_once(tmp_path, caplog):
    caplog.set_level(logging.INFO, "qpref")
    write_gguf(tmp_path / "tiny.gguf")
    first = resolve(tmp_path / "tiny.gguf")
    written = (first.path / "model.safetensors").stat().st_mtime_ns
    assert resolve(tmp_path / "tiny.gguf") == first
    assert (first.path / "model.safetensors").stat().st_mtime_ns == written
    assert sum(record.getMessage().startswith("converting") for record in caplog.records) == 1


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json", "MANIFEST.json"])
def test_a_damaged_conversion_is_named_and_made_again(tmp_path, caplog, name):
    write_gguf(tmp_path / "tiny.gguf")
    first = resolve(tmp_path / "tiny.gguf")
    whole = {path.name: path.read_bytes() for path in first.path.iterdir()}
    content = bytearray(whole[name])
    content[len(content) // 2] ^= 1
    status = (first.path / name).stat()
    (first.path / name).write_bytes(content)
    os.utime(first.path / name, ns=(status.st_atime_ns, status.st_mtime_ns))  # a disk changes no times
    convert._damaged_file.cache_clear()
    assert resolve(tmp_path / "tiny.gguf") == first
    assert {path.name: path.read_bytes() for path in first.path.iterdir()} == whole
    assert any(" is not as it was written; converting tiny.gguf again" in message for message in caplog.messages)


def test_a_conversion_is_hashed_once_a_run(tmp_path, monkeypatch):
    write_gguf(tmp_path / "tiny.gguf")
    resolve(tmp_path / "tiny.gguf")
    hashed = []
    monkeypatch.setattr(publish, "damaged_file", lambda folder: hashed.append(folder))
    for _ in range(3):
        resolve(tmp_path / "tiny.gguf")
    assert len(hashed) == 1


def test_a_file_that_was_damaged_since_it_was_hashed_is_not_converted(tmp_path, cache):
    path = tmp_path / "tiny.gguf"
    write_gguf(path)
    source.cached_sha256(path)
    status, content = path.stat(), bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    with pytest.raises(PolicyError, match=r"tiny\.gguf: its content has changed"):
        resolve(path)
    assert not (cache / "models").exists()


@pytest.mark.parametrize("content", ["", "abc", f"{'0' * 64}", f"{'0' * 64} {'0' * 16}", "\0"], ids=len)
def test_a_damaged_cached_hash_is_not_believed(tmp_path, cache, content):
    (tmp_path / "file").write_bytes(b"abc")
    expected = source.cached_sha256(tmp_path / "file")
    assert expected == hashlib.sha256(b"abc").hexdigest()
    (known,) = (cache / "sha256").iterdir()
    known.write_text(content)
    assert source.cached_sha256(tmp_path / "file") == expected
    known.write_text(known.read_text().replace(expected, "0" * 64))
    assert source.cached_sha256(tmp_path / "file") == expected


def test_a_cached_hash_is_believed(tmp_path, cache, monkeypatch):
    (tmp_path / "file").write_bytes(b"abc")
    expected = source.cached_sha256(tmp_path / "file")
    monkeypatch.setattr(source.fsio, "sha256_file", lambda path: "computed again")
    assert source.cached_sha256(tmp_path / "file") == expected


def test_a_read_only_cache_of_hashes_is_said_and_done_without(tmp_path, cache, monkeypatch, caplog):
    (tmp_path / "file").write_bytes(b"abc")
    cache.mkdir(exist_ok=True)
    (cache / "sha256").touch()  # a file in the folder's place is refused to root, too
    assert source.cached_sha256(tmp_path / "file") == hashlib.sha256(b"abc").hexdigest()
    assert any("the hash of file is not cached" in message for message in caplog.messages)


def test_a_member_that_unpacks_without_end_is_refused(shelf, cache):
    put_wheel(shelf, {"tiny_base/tiny.gguf": bytes(300 * 2**20)}, zipfile.ZIP_DEFLATED)
    with pytest.raises(PolicyError, match=r"tiny_base/tiny\.gguf unpacks to 314572800 bytes from \d+; no model"):
        resolve("pypi:tiny-base==1.0/tiny_base/tiny.gguf")
    assert not [path for path in cache.rglob("*") if path.is_file()]


def test_a_member_that_claims_to_be_huge_is_refused(shelf, monkeypatch):
    put_wheel(shelf, {"tiny_base/tiny.gguf": b"GGUF" * 100})
    monkeypatch.setattr(pypi, "LARGEST_MEMBER", 100)
    with pytest.raises(PolicyError, match=r"tiny_base/tiny\.gguf unpacks to 0\.0 GiB, the limit is 0 GiB"):
        resolve("pypi:tiny-base==1.0/tiny_base/tiny.gguf")


def test_a_damaged_wheel_is_named(shelf):
    put_wheel(shelf, {"tiny_base/tiny.gguf": b"GGUF" * 100})
    (wheel,) = shelf.iterdir()
    wheel.write_bytes(wheel.read_bytes().replace(b"GGUF" * 100, b"GGUF" * 99 + b"GGUG", 1))
    with pytest.raises(
        PolicyError, match=r"tiny_base-1\.0-py3-none-any\.whl: tiny_base/tiny\.gguf cannot be unpacked: Bad CRC"
    ):
        resolve("pypi:tiny-base==1.0/tiny_base/tiny.gguf")


def test_another_file_under_the_same_name_is_converted_too(tmp_path):
    write_gguf(tmp_path / "tiny.gguf")
    first = resolve(tmp_path / "tiny.gguf")
    write_gguf(tmp_path / "tiny.gguf", splitting="gpt-2")
    assert resolve(tmp_path / "tiny.gguf").path != first.path


def test_a_file_with_another_hash_than_the_recipes_is_refused(tmp_path):
    path = tmp_path / "tiny.gguf"
    write_gguf(path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    with pytest.raises(PolicyError, match=f"its SHA-256 is {digest}, the recipe says 0000"):
        resolve(path, sha256="0" * 64)
    assert resolve(path, sha256=digest).path.is_dir()


def test_an_unknown_splitting_is_refused_with_the_way_out(tmp_path, cache):
    write_gguf(tmp_path / "tiny.gguf", splitting="brand-new")
    with pytest.raises(PolicyError, match="splits text by the rule 'brand-new', which transformers doesn't") as caught:
        resolve(tmp_path / "tiny.gguf")
    assert caught.value.hint == "name the original model's folder or hub id in [model] tokenizer"
    assert not list((cache / "models").glob("*"))


def test_a_tokenizer_from_elsewhere_gets_around_an_unknown_splitting(tmp_path, folder):
    write_gguf(tmp_path / "tiny.gguf", splitting="brand-new")
    model = section(tmp_path / "tiny.gguf", tokenizer=str(folder))
    base = resolve_base(model)
    assert (base.path / "model.safetensors").is_file()
    assert load_tokenizer(model, base).tokenize("12") == ["1", "2"]


def test_a_base_without_a_tokenizer_is_refused(folder):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    model = section(folder)
    with pytest.raises(PolicyError, match="no tokenizer that transformers can load"):
        load_tokenizer(model, resolve_base(model))


def test_stop_tokens_are_those_of_generation_and_of_the_config(folder):
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [256, 258]}))
    assert set(stop_tokens(resolve(folder))) == {256, 258}


@pytest.mark.parametrize("share", [0.0, 0.001, 0.3, 0.999])
def test_a_file_that_was_cut_off_is_refused(share, tmp_path, cache):
    path = tmp_path / "tiny.gguf"
    write_gguf(path)
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    with pytest.raises(PolicyError, match="transformers can't read this GGUF file"):
        resolve(path)
    assert not list((cache / "models").glob("*"))


def test_a_file_that_lacks_a_weight_is_refused(tmp_path, cache):
    write_gguf(tmp_path / "tiny.gguf", left_out="blk.1.ffn_up.weight")
    with pytest.raises(PolicyError, match=r"it lacks 1 of its model's weights, .*layers\.1\.mlp\.up_proj\.weight"):
        resolve(tmp_path / "tiny.gguf")
    assert not list((cache / "models").glob("*"))


def test_a_file_that_is_no_gguf_is_refused(tmp_path):
    (tmp_path / "tiny.gguf").write_bytes(b"nonsense" * 100)
    with pytest.raises(PolicyError, match="transformers can't read this GGUF file"):
        resolve(tmp_path / "tiny.gguf")


# Quantized folders

Load = Callable[..., object]


@pytest.fixture
def load(make_recipe) -> Load:
    def load(changes: dict[str, object]):
        recipe = Recipe.model_validate(make_recipe(changes))
        return load_policy(recipe, resolve_base(recipe.model))

    return load


@pytest.fixture
def quantized(folder, tmp_path) -> Path:
    """The base in NF4 as transformers saves it, with a compute type that is not the recipe's."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float16,
    )  # fmt: skip
    AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, dtype=torch.float32).save_pretrained(
        tmp_path / "quantized"
    )
    make_tokenizer().save_pretrained(tmp_path / "quantized")
    return tmp_path / "quantized"


def logprobs(policy) -> torch.Tensor:
    from array import array

    from qpref.data.pack import pack
    from qpref.policy.logprobs import completion_logprobs
    from qpref.records import Source, TokenizedExample

    example = TokenizedExample(
        prompt=array("i", range(5)), branches=(array("i", range(9)), array("i", range(7, 20))),
        truncated=(False, False), weight=1.0, margin=0.0, source=Source(path="made", line=1),
    )  # fmt: skip
    return completion_logprobs(policy, pack([example], policy.device)).values.detach()


@pytest.mark.parametrize("quantization", ["nf4", "none"])
def test_a_quantized_base_loads_as_it_is(quantization, load, folder, quantized):
    made_here = load({"model.base": str(folder), "model.quantization": "nf4"})
    loaded = load({"model.base": str(quantized), "model.quantization": quantization})
    assert loaded.quantized_modules() == made_here.quantized_modules()
    assert torch.equal(logprobs(loaded), logprobs(made_here))


@pytest.mark.parametrize(
    ("settings", "method"),
    [
        ({"quant_method": "gptq", "bits": 4}, "gptq"),
        ({"quant_method": "awq", "bits": 4}, "awq"),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "bitsandbytes in 8 bits"),
        ({"bits": 4}, "an unknown method"),
    ],
    ids=["gptq", "awq", "8bit", "unknown"],
)
@pytest.mark.parametrize("part", [None, "text_config"])
def test_a_base_that_is_quantized_in_another_way_is_refused(settings, method, part, load, folder):
    change_config(folder, **{part or "quantization_config": {"quantization_config": settings} if part else settings})
    (folder / "model.safetensors").unlink()  # no weights are needed to tell
    with pytest.raises(PolicyError, match=f"quantized by {method}; only bitsandbytes' 4-bit bases can be trained"):
        load({"model.base": str(folder)})


def test_mxfp4_is_refused_with_what_to_use_instead(load, folder):
    change_config(folder, quantization_config={"quant_method": "mxfp4"})
    with pytest.raises(PolicyError, match="quantized by mxfp4") as caught:
        load({"model.base": str(folder)})
    assert "dequantized to bf16" in str(caught.value.hint)


def test_fp16_on_a_cpu_is_refused_with_the_way_out(load, folder):
    with pytest.raises(PolicyError, match="a CPU doesn't compute in fp16") as caught:
        load({"model.base": str(folder), "model.dtype": "fp16", "model.device": "cpu"})
    assert caught.value.hint == 'set dtype = "bf16" or "float32"'


def test_an_architecture_that_nobody_knows_is_refused(load, folder):
    change_config(folder, model_type="brand_new")
    with pytest.raises(PolicyError, match="transformers can't load this model"):
        load({"model.base": str(folder)})


def test_spoiled_weights_are_refused(load, folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(PolicyError, match="transformers can't load this model"):
        load({"model.base": str(folder)})


@pytest.mark.parametrize("quantization", ["nf4", "none"])
def test_a_base_that_lacks_a_weight_is_refused(quantization, load, folder):
    path, name = folder / "model.safetensors", "model.layers.1.mlp.up_proj.weight"
    save_file({key: value for key, value in load_file(path).items() if key != name}, path, {"format": "pt"})
    with pytest.raises(PolicyError, match=f"it lacks 1 of its model's weights, the first is {name}"):
        load({"model.base": str(folder), "model.quantization": quantization})


def test_a_tied_head_is_no_missing_weight(load, make_base):
    assert "lm_head.weight" not in load_file(make_base("qwen") / "model.safetensors")
    load({"model.base": str(make_base("qwen"))})
