"""Whole commands on hundreds of malformed files: each ends with an exit code, in time, without a traceback."""

import json
import random
import shutil
import time

import pytest
import tomli_w
from malformed import forked, malformed_json, replaced, whole_files

from qpref.cli import main

NUM_CASES = 25
SECONDS = 60
"""Longest that a command may take, on a busy machine."""


def command(*arguments):
    return lambda: main(list(map(str, arguments)))


def safetensors_cases(path):
    """Malformed headers of a safetensors file, before its own tensors."""
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = path.with_name("header.json")
    header.write_bytes(content[8 : 8 + length])
    first = next(iter(json.loads(header.read_text())))
    for name, text in malformed_json(header, lambda place: place[0] in (first, "__metadata__")):
        yield name, len(text).to_bytes(8, "little") + text + content[8 + length :]
    header.unlink()
    for number in (2**63, 2**33, length - 1):
        yield f"a header of {number} bytes", number.to_bytes(8, "little") + content[8:]
    yield "no tensors", content[: 8 + length]


@pytest.fixture
def workplace(tmp_path, make_base, make_recipe, trained_run):
    """A base, a start adapter, a finished run and recipes that use them; paths by name."""
    places = {name: tmp_path / name for name in ("base", "start", "run")}
    shutil.copytree(make_base(), places["base"])
    shutil.copytree(trained_run(), places["run"])
    shutil.copytree(places["run"] / "adapter", places["start"])
    changes = {"model.base": str(places["base"]), "train.max_steps": 1}
    for name, more in {"plain": {}, "started": {"adapter.start": str(places["start"])}}.items():
        places[name] = tmp_path / f"{name}.toml"
        places[name].write_text(tomli_w.dumps(make_recipe(changes | more)))
    return places


CASES = {
    "config, train": ("base/config.json", ("train", "@plain", "--output", "@out"), malformed_json),
    "config, plan": ("base/config.json", ("plan", "@plain"), malformed_json),
    "stop tokens": ("base/generation_config.json", ("check", "@plain"), malformed_json),
    "tokenizer": ("base/tokenizer.json", ("check", "@plain"), malformed_json),
    "tokenizer settings": ("base/tokenizer_config.json", ("check", "@plain"), malformed_json),
    "template": ("base/chat_template.jinja", ("check", "@plain"), lambda path: whole_files(path.read_bytes()).items()),
    "weights": ("base/model.safetensors", ("train", "@plain", "--output", "@out"), safetensors_cases),
    "start settings": ("start/adapter_config.json", ("train", "@started", "--output", "@out"), malformed_json),
    "start weights": ("start/adapter_model.safetensors", ("train", "@started", "--output", "@out"), safetensors_cases),
    "adapter, eval": ("start/adapter_config.json", ("eval", "@start", "--data", "@heldout"), malformed_json),
    "run.json, eval": ("run/run.json", ("eval", "@run"), malformed_json),
    "run.json, merge": ("run/run.json", ("merge", "@run", "@out"), malformed_json),
    "run.json, report": ("run/run.json", ("report", "@run"), malformed_json),
    "recipe": ("plain.toml", ("plan", "@plain"), lambda path: whole_files(path.read_bytes()).items()),
}  # fmt: skip


@pytest.mark.soak
@pytest.mark.parametrize(("name", "arguments", "make"), CASES.values(), ids=CASES)
def test_a_command_on_a_malformed_file_ends_with_an_exit_code(workplace, tmp_path, name, arguments, make):
    path = tmp_path / name
    places = workplace | {"out": tmp_path / "out", "heldout": tmp_path / "heldout.jsonl"}
    work = command(*(places.get(word.removeprefix("@"), word) for word in arguments))
    cases = list(make(path))
    if len(cases) > NUM_CASES:
        cases = random.Random(0).sample(cases, NUM_CASES)
    problems = {}
    for label, content in cases:
        shutil.rmtree(places["out"], ignore_errors=True)
        with replaced(path, content):
            ended = forked(work, SECONDS)
        if ended.problem:
            problems[label] = ended.problem
    assert not problems


def test_a_traceback_a_hang_and_an_escape_are_found():
    assert "ZeroDivisionError" in (forked(lambda: 1 / 0).problem or "")
    assert forked(lambda: time.sleep(60), 0.2).problem == "hangs"
    assert forked(lambda: print("\x1b[31m")).problem == "prints an escape sequence"
    assert forked(lambda: print("fine")).problem is None
