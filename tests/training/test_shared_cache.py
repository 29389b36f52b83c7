"""Two `qpref train` at once on one cache: both end well, whether it is fresh or what is in it is damaged.

The base is a GGUF file, which whoever comes first converts for both. In two containers, processes have the same ids: a
pid namespace for each stands for them, or where the machine allows none, a function that says so.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import tomli_w
from conftest import preference_rows, rows_of, write_jsonl
from forks import CLONE_NEWPID, enter_namespaces, exit_code, forked, gate
from gguf_files import write_gguf
from tally import Tally

import qpref
from qpref import publish
from qpref.cli import main


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Path:
    """A recipe on a GGUF base: two steps, reference scores cached."""
    folder = tmp_path_factory.mktemp("shared")
    write_gguf(folder / "tiny.gguf")
    tables = {
        "model": {"base": str(folder / "tiny.gguf"), "quantization": "none", "dtype": "bf16"},
        "adapter": {"rank": 2, "alpha": 4},
        "data": {"train": str(write_jsonl(folder / "train.jsonl", preference_rows(4)))},
        "checks": {"too_short": "off"},
        "loss": {"name": "dpo"},
        "train": {"batch_size": 2, "tokens_per_microbatch": 400, "gradient_checkpointing": False},
        "sinks": [],
    }
    (folder / "recipe.toml").write_text(tomli_w.dumps(tables))
    with pytest.MonkeyPatch.context() as patch:  # imports all that the forks need
        patch.setenv("QPREF_CACHE", str(folder / "cache"))
        qpref.train(tables, output=folder / "run")
    return folder / "recipe.toml"


def start(recipe: Path, folder: Path, wait: Callable[[], None], in_container: bool) -> int:
    """Fork `qpref train`, which begins once `wait` returns; in a container its process id is 1."""

    def train() -> None:
        os.environ["QPREF_CACHE"] = str(folder.parent / "cache")
        sys.stderr = (folder.parent / f"{folder.name}.log").open("w", buffering=1)
        logging.disable(logging.NOTSET)
        wait()
        main(["train", str(recipe), "--output", str(folder)])

    def first_process() -> None:
        assert os.getpid() == 1
        train()

    def contain() -> None:
        if not enter_namespaces(CLONE_NEWPID):
            os.getpid = lambda: 1
            train()
        sys.exit(abs(exit_code(forked(first_process))))

    return forked(contain if in_container else train)


def one_round(recipe: Path, root: Path, in_container: bool, tally: Tally) -> None:
    """Start two runs at once, and compare what they and their cache are with each other."""
    runs = [root / "first", root / "second"]
    with gate() as (wait, open_gate):
        children = [start(recipe, folder, wait, in_container) for folder in runs]
        open_gate()
        codes = [exit_code(child) for child in children]
    logs = [(root / f"{folder.name}.log").read_text() for folder in runs]
    assert codes == [0, 0], "\n".join(logs)
    adapters = [(folder / "adapter/adapter_model.safetensors").read_bytes() for folder in runs]
    assert adapters[0] == adapters[1]
    assert rows_of(runs[0]) == rows_of(runs[1])
    (converted,) = (root / "cache/models").iterdir()
    assert publish.damaged_file(converted) is None
    assert {json.loads((folder / "run.json").read_text())["base_path"] for folder in runs} == {str(converted)}
    assert not list((root / "cache").rglob(".tmp-*"))
    tally["rounds of two starts" + (" with the same process id" if in_container else "")] += 1
    tally["rounds in which both converted"] += all("converting tiny.gguf to" in log for log in logs)


@pytest.mark.parametrize("num_rounds", [2, pytest.param(100, marks=pytest.mark.soak)])
@pytest.mark.parametrize("in_container", [False, True], ids=["processes", "containers"])
def test_two_starts_on_a_fresh_cache_both_end_well(recipe, tmp_path, tally, in_container, num_rounds):
    for number in range(num_rounds):
        root = tmp_path / str(number)
        root.mkdir()
        one_round(recipe, root, in_container, tally)
        shutil.rmtree(root)


@pytest.mark.parametrize("num_rounds", [2, pytest.param(20, marks=pytest.mark.soak)])
def test_two_starts_on_a_damaged_conversion_both_end_well(recipe, tmp_path, tally, num_rounds):
    one_round(recipe, tmp_path, False, tally)
    (weights,) = (tmp_path / "cache/models").glob("*/model.safetensors")
    for _ in range(num_rounds):
        for name in ("first", "second"):
            shutil.rmtree(tmp_path / name)
        content = bytearray(weights.read_bytes())
        content[-1] ^= 1
        weights.write_bytes(content)
        one_round(recipe, tmp_path, False, tally)


@pytest.mark.parametrize("num_rounds", [1, pytest.param(20, marks=pytest.mark.soak)])
def test_a_start_beside_one_that_is_killed_while_it_converts_ends_well(
    recipe, tmp_path, tally, monkeypatch, num_rounds
):
    """What the killed one leaves is removed by the next, even if its process id is the other's too."""
    real = publish.write_json

    def write_manifest(path: Path, value: object) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    for number in range(num_rounds):
        root = tmp_path / str(number)
        root.mkdir()
        monkeypatch.setattr(publish, "write_json", write_manifest)
        assert exit_code(start(recipe, root / "killed", lambda: None, False)) == -signal.SIGKILL
        monkeypatch.setattr(publish, "write_json", real)
        assert list((root / "cache/models").glob(".tmp-*"))
        tally["SIGKILLs at chosen operations"] += 1
        one_round(recipe, root, False, tally)
        shutil.rmtree(root)
