"""Each function of the interface, called wrongly: its errors say what to do in arguments, not in options."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Callable

import pytest
from conftest import preference_rows, write_jsonl

import qpref
from qpref.errors import QprefError

OPTION = re.compile(r"(?<![\w-])--[a-z]")
ADAPTER = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]}


@pytest.fixture
def at(tmp_path):
    """`at(name)`: a path under the test's folder, where an adapter without a base and an unfinished run are."""
    for name, base in (("adapter", {}), ("moved", {"base_model_name_or_path": str(tmp_path / "nowhere")})):
        (tmp_path / name).mkdir()
        (tmp_path / name / "adapter_config.json").write_text(json.dumps(ADAPTER | base))
        (tmp_path / name / "adapter_model.safetensors").write_bytes(b"")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text("{}")
    write_jsonl(tmp_path / "pairs.jsonl", preference_rows(4))
    return lambda name: tmp_path / name


def recipe(at) -> dict:
    return {
        "model": {"base": str(at("nowhere")), "device": "cpu"},
        "data": {"train": str(at("pairs.jsonl"))},
        "loss": {"name": "dpo"},
    }


CASES: dict[str, tuple[Callable, str]] = {
    "train: a run is there": (lambda at: qpref.train(recipe(at), output=at("run")), "continue with resume=True"),
    "train: both": (
        lambda at: qpref.train(recipe(at), output=at("run"), resume=True, overwrite=True),
        "resume=True and overwrite=True exclude",
    ),
    "train: other files": (lambda at: qpref.train(recipe(at), output=at("adapter")), "another folder with output="),
    "plan: card": (lambda at: qpref.plan(recipe(at), card="RTX 9999"), 'vram="12GiB"'),
    "plan: card on a CPU": (lambda at: qpref.plan(recipe(at), card="RTX 4090"), 'overrides=["model.device=auto"]'),
    "plan: size": (lambda at: qpref.plan(recipe(at), vram="much"), "vram=: expected a size"),
    "plan: shape": (lambda at: qpref.plan(recipe(at), shape="nowhere"), 'shape="nowhere": neither'),
    "plan: no shape": (lambda at: qpref.plan(recipe(at)), "nowhere"),
    "plan: override": (lambda at: qpref.plan(recipe(at), overrides=["train.x"]), 'overrides=["train.x"]: expected'),
    "check: no file": (lambda at: qpref.check(at("nothing.jsonl")), "no such file"),
    "check: reader": (lambda at: qpref.check(at("pairs.jsonl"), reader="none"), "no reader 'none'"),
    "generate: unfinished": (lambda at: qpref.generate(at("run")), "qpref.train(recipe, resume=True)"),
    "generate: no base": (lambda at: qpref.generate(at("adapter"), ["a"]), "name it with base="),
    "evaluate: no base": (lambda at: qpref.evaluate(at("adapter"), data=at("pairs.jsonl")), "name it with base="),
    "gate: no base": (lambda at: qpref.gate(at("adapter")), "name it with base="),
    "gate: unfinished": (lambda at: qpref.gate(at("run")), "qpref.train(recipe, resume=True)"),
    "merge: unfinished": (lambda at: qpref.merge(at("run"), at("out")), "qpref.train(recipe, resume=True)"),
    "merge: limit": (
        lambda at: qpref.merge(at("adapter"), at("out"), max_margin_error="lots"),
        'max_margin_error="lots": expected',
    ),
    "load: unfinished": (lambda at: qpref.load(at("run")), "qpref.train(recipe, resume=True)"),
    "load: base moved": (lambda at: qpref.load(at("moved")), "name the base with base="),
}


@pytest.mark.parametrize("case", CASES)
def test_an_error_names_arguments(at, case):
    call, advice = CASES[case]
    with pytest.raises(QprefError) as raised:
        call(at)
    assert advice in str(raised.value)
    assert not OPTION.search(str(raised.value))


def test_each_function_of_the_interface_has_a_case():
    functions = {name for name in qpref.__all__ if inspect.isfunction(getattr(qpref, name))}
    assert {case.partition(":")[0] for case in CASES} == functions
