"""A malformed file of a base, a tokenizer, an adapter, a run or a recipe is one sentence that names it."""

import contextlib
import json
import os
import shutil
import time
from pathlib import Path

import peft  # noqa: F401  its import would be timed
import pytest
import tomli_w
from click.testing import CliRunner
from malformed import malformed_json, replaced, whole_files

from qpref.cli import main
from qpref.errors import PolicyError, QprefError, RecipeError
from qpref.opening import read_object
from qpref.policy import adapter_folder
from qpref.policy.model_config import EXPECTED, read_model_config
from qpref.policy.pretrained import read_config
from qpref.policy.source import resolve_base, shard_files
from qpref.policy.tokenizer import load_tokenizer, stop_tokens
from qpref.recipe.document import read_document
from qpref.recipe.resolve import make_plan
from qpref.recipe.sections import ModelSection
from qpref.sealed import SEAL, write_sealed
from qpref.training.folder import RunFolder
from qpref.training.run_json import REQUIRED

LONG = 0.9
"""Seconds that a refusal may take."""
SLOW = ("(a+)+$", "(?:a|a)*x", "(.*)*q_proj", r"(\w+\s?)*:", ".*.*.*.*.*.*.*x", "(?:(?:a?){30}){30}b")
QUICK = (
    r"(?:.*?(?:language|text).*?(?:self_attn|mlp).*?(?:k_proj|v_proj).*?)|(?:\bmodel\.layers\.\d{1,}\.(?:mlp|attn))",
    r".*\.layers\.(0|1|2)\.self_attn\.(q_proj|v_proj)",
    r"(?:model\.)?layers\.\d+\.mlp\.(?:gate|up)_proj",
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)",
    r"[\p{N}]{1,3}(?=(?:\p{N}{3})*(?!\p{N}))",
    r" ?[^(\s|[.,!?])]+",
    r"[A-Z&&[^B\]]]+x|\[a\]+|[]a]+",
    r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t)?",
)


@pytest.fixture
def base(make_base, tmp_path):
    return Path(shutil.copytree(make_base(), tmp_path / "base"))


@pytest.fixture
def adapter(tmp_path):
    folder = tmp_path / "adapter"
    folder.mkdir()
    settings = {
        "peft_type": "LORA",
        "r": 4,
        "lora_alpha": 8,
        "target_modules": ["q_proj"],
        "rank_pattern": {"q_proj": 2},
    }
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return folder


def section(base):
    return ModelSection(base=str(base))


def refuse_or_read(read, path, cases, kind=QprefError):
    """Read each malformed version of a file: it is accepted, or refused in a sentence that names the file or folder."""
    refusals = []
    with contextlib.suppress(kind):
        read()  # its imports would be timed
    for name, content in cases:
        with replaced(path, content):
            started = time.process_time()
            try:
                read()
            except kind as error:
                refusals.append((name, str(error)))
            assert time.process_time() - started < LONG, ascii(name)
    odd = [(name, text) for name, text in refusals if str(path.parent) not in text or len(text) > 1000]
    assert not odd
    return len(refusals)


def test_any_value_in_a_config_is_read_or_refused(base):
    path = base / "config.json"

    def read():
        read_model_config(base)
        stop_tokens(resolve_base(section(base)))
        read_config(base)

    cases = list(malformed_json(path))
    assert refuse_or_read(read, path, cases, PolicyError) > len(cases) / 3


@pytest.mark.parametrize("name", ["generation_config.json", "config.json"])
def test_any_stop_token_is_read_or_refused(base, name):
    path = base / name
    path.write_text(json.dumps({"eos_token_id": [2]}))
    refused = refuse_or_read(lambda: stop_tokens(resolve_base_unchecked(base)), path, malformed_json(path), PolicyError)
    assert refused > 20


def resolve_base_unchecked(base):
    from qpref.policy.source import BaseFolder

    return BaseFolder(path=base, weights={})


def test_any_tokenizer_settings_are_read_or_refused(base):
    path = base / "tokenizer_config.json"
    cases = list(malformed_json(path))
    assert refuse_or_read(lambda: load_tokenizer(section(base), resolve_base_unchecked(base)), path, cases) > 20


def test_any_adapter_settings_are_read_or_refused(adapter):
    path = adapter / "adapter_config.json"

    def read():
        adapter_folder.lora_config(adapter_folder.read_settings(adapter))

    assert refuse_or_read(read, path, malformed_json(path), PolicyError) > 60


def test_any_index_is_read_or_refused(base):
    path = base / "model.safetensors.index.json"
    path.write_text(json.dumps({"metadata": {}, "weight_map": {"a": "model.safetensors"}}))
    assert refuse_or_read(lambda: shard_files(base), path, malformed_json(path), PolicyError) > 30


def test_any_run_json_is_read_or_refused(trained_run, tmp_path):
    run = Path(shutil.copytree(trained_run(), tmp_path / "run"))
    path = run / "run.json"

    def read():
        with contextlib.suppress(OSError, ValueError, RecursionError):
            values = read_object(path)
            # Sealed again, or its hash would tell.
            write_sealed(path, {name: value for name, value in values.items() if name != SEAL})
        RunFolder(run).description()

    required = malformed_json(path, lambda place: place[0] in REQUIRED and len(place) <= 2)
    assert refuse_or_read(read, path, required, RecipeError) > 100


def test_any_recipe_is_read_or_refused(tmp_path, make_recipe):
    path = tmp_path / "tiny.toml"
    path.write_text(tomli_w.dumps(make_recipe()))
    cases = whole_files(path.read_bytes())
    cases |= {"dots": f"{'a.' * 30_000}b = 1".encode(), "quoted": b'"a" . ' * 30_000 + b"b = 1",
              "header": f"[{'a.' * 30_000}b]".encode(), "inline": f"a = {{ {'b.' * 30_000}c = 1 }}".encode(),
              "digits": b"a = 1" + b"0" * 5000, "lists": b"a = " + b"[" * 100_000, "large": b"# " + b"x" * 2**21,
              "tables": b"a = " + b"{a=" * 500 + b"1" + b"}" * 500}  # fmt: skip
    refused = refuse_or_read(lambda: read_document(path), path, cases.items(), RecipeError)
    assert refused >= len(cases) - 3  # but the empty ones and the one with a byte order mark


@pytest.mark.parametrize("value", [10**400, 2**63, "a\0b", "a\udcff", {"x\0": 1}, [["\0"]]])
def test_a_recipe_that_cannot_be_stored_is_refused_with_its_key(make_recipe, value):
    recipe = make_recipe({"train.seed": value})
    with pytest.raises(RecipeError, match=r"train\.seed.*: a number of more than 64 bits, or a text with a NUL"):
        make_plan(recipe)


@pytest.mark.parametrize("text", ["loss.beta=" + "[" * 100_000, ".".join("a" * 30_000) + "=1", "a=1" + "0" * 5000])
def test_a_hostile_override_is_refused(make_recipe, text):
    with pytest.raises(RecipeError) as caught:
        make_plan(make_recipe(), [text])
    assert len(str(caught.value)) < 2000


@pytest.mark.parametrize("name", EXPECTED)
def test_a_size_of_another_kind_is_named(base, name):
    path = base / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"text_config": {name: {"x": 1}}}))
    with pytest.raises(PolicyError, match=rf"config\.json: {name}: expected .*, got {{'x': 1}}"):
        resolve_base(section(base))


def test_ten_million_layers_are_refused_at_once(base):
    path = base / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"num_hidden_layers": 10_000_000}))
    started = time.process_time()
    with pytest.raises(PolicyError, match="num_hidden_layers: expected a whole number from 1 to 512, got 10000000"):
        resolve_base(section(base))
    assert time.process_time() - started < LONG


# Waiting for ever.


def make_fifo(path):
    path.unlink(missing_ok=True)
    os.mkfifo(path)


def link_device(path):
    path.unlink(missing_ok=True)
    path.symlink_to("/dev/zero")


@pytest.mark.parametrize("make", [make_fifo, link_device])
@pytest.mark.parametrize(
    "name", ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "generation_config.json",
             "chat_template.jinja", "model.safetensors.index.json", "special_tokens_map.json"],
)  # fmt: skip
def test_a_file_of_a_base_that_is_none_is_refused(base, name, make):
    make(base / name)
    with pytest.raises(PolicyError, match=rf"{name}: it is a (FIFO|device), not a regular file"):
        resolve_base(section(base))


@pytest.mark.parametrize("make", [make_fifo, link_device])
@pytest.mark.parametrize("read", [adapter_folder.read_settings, adapter_folder.read_tensors])
def test_a_file_of_an_adapter_that_is_none_is_refused(adapter, make, read):
    for name in (adapter_folder.SETTINGS, adapter_folder.TENSORS):
        make(adapter / name)
    with pytest.raises(PolicyError, match=r"it is a (FIFO|device), not a regular file"):
        read(adapter)


@pytest.mark.parametrize("make", [make_fifo, link_device])
@pytest.mark.parametrize("arguments", [("train",), ("plan",), ("check",), ("train", "--dry-run")])
def test_a_recipe_that_is_no_file_is_refused(tmp_path, make, arguments):
    path = tmp_path / "tiny.toml"
    make(path)
    done = CliRunner().invoke(main, [arguments[0], str(path), *arguments[1:]], catch_exceptions=False)
    assert done.exit_code == 2
    assert "not a regular file" in done.output


@pytest.mark.parametrize("pattern", SLOW)
@pytest.mark.parametrize("key", ["rank_pattern", "alpha_pattern", "target_modules", "exclude_modules"])
def test_a_pattern_of_an_adapter_that_backtracks_is_refused(adapter, key, pattern):
    path = adapter / "adapter_config.json"
    value = pattern if key.endswith("modules") else {pattern: 4}
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    with pytest.raises(PolicyError, match=r"adapter_config\.json: the pattern .* is refused"):
        adapter_folder.read_settings(adapter)


@pytest.mark.parametrize("pattern", [*SLOW, "(" * 5000 + ")" * 5000, "a" * 30_000, "("])
def test_a_pattern_of_a_tokenizer_that_backtracks_is_refused(base, pattern):
    path = base / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    tokenizer["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [split, tokenizer["pre_tokenizer"]]}
    path.write_text(json.dumps(tokenizer))
    with pytest.raises(PolicyError, match=r"tokenizer\.json: the pattern .* is refused"):
        load_tokenizer(section(base), resolve_base_unchecked(base))


@pytest.mark.parametrize("pattern", QUICK)
def test_usual_patterns_are_quick(pattern):
    from qpref.patterns import why_slow

    assert why_slow(pattern, of_tokenizer="[" in pattern) is None


@pytest.mark.parametrize("make", [make_fifo, link_device])
def test_a_file_that_is_read_on_the_side_is_no_place_to_wait(tmp_path, make):
    from qpref.errors import DataError
    from qpref.evaluation.generate import read_prompts
    from qpref.report.read import read_json
    from qpref.training.card import _adapter_step

    for name in ("result.json", "prompts.txt"):
        make(tmp_path / name)
    assert _adapter_step(tmp_path / "result.json") is None
    with pytest.raises(DataError, match="not a regular file"):
        read_json(tmp_path / "result.json")
    with pytest.raises(DataError, match="not a regular file"):
        read_prompts(str(tmp_path / "prompts.txt"))
