"""`qpref cache`: everything that is kept is listed, and what is named is removed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from qpref.cli import main


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("QPREF_CACHE", str(tmp_path))
    for path, size in {
        "models/small-v2/model.safetensors": 3 * 2**20,
        "models/small-v2/config.json": 100,
        "reference/aa/one.shard": 2**20,
        "reference/aa/two.shard": 2**20,
        "sha256/1-2-3-4": 64,
    }.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_bytes(b"x" * size)
    return tmp_path


def run(*arguments: str):
    return CliRunner().invoke(main, ["cache", *arguments])


def test_every_kind_and_entry_is_listed_with_its_size(cache):
    result = run()
    assert result.exit_code == 0
    words = [line.split()[:3] for line in result.output.splitlines()]
    assert ["models", "3.0", "MiB"] in words
    assert ["pypi", "0.0", "MiB"] in words
    assert ["2.0", "MiB", "aa,"] in words
    assert ["all", "5.0", "MiB"] in words


def test_json_has_bytes(cache):
    entries = json.loads(run("--json").output)
    assert [(entry["kind"], entry["name"], entry["num_bytes"]) for entry in entries] == [
        ("models", "small-v2", 3 * 2**20 + 100),
        ("reference", "aa", 2**21),
        ("sha256", "1-2-3-4", 64),
    ]


def test_only_the_kinds_named_are_removed(cache):
    result = run("clear", "reference", "sha256", "reference")
    assert result.output == "reference: 2.0 MiB freed\nsha256: 0.0 MiB freed\n"
    assert sorted(path.name for path in cache.iterdir()) == ["models"]


def test_clearing_takes_a_kind(cache):
    assert run("clear").exit_code == 2
    assert run("clear", "everything").exit_code == 2
    assert len(list(cache.iterdir())) == 3


def test_an_empty_cache_is_no_error(tmp_path, monkeypatch):
    monkeypatch.setenv("QPREF_CACHE", str(tmp_path / "none"))
    assert run().exit_code == 0
    assert run("clear", "models").output == "models: 0.0 MiB freed\n"


def test_links_are_listed_as_themselves_and_not_followed(cache, tmp_path_factory):
    outside = tmp_path_factory.mktemp("outside") / "large"
    outside.write_bytes(b"x" * 2**21)
    for name, target in {"gone": "nowhere", "circle": "circle", "leading": outside}.items():
        (cache / "reference" / "aa" / name).symlink_to(target)
        (cache / "tokens").mkdir(exist_ok=True)
        (cache / "tokens" / name).symlink_to(target)
    entries = {entry["name"]: entry["num_bytes"] for entry in json.loads(run("--json").output)}
    assert entries["aa"] == 2**21
    assert {entries[name] for name in ("gone", "circle", "leading")} == {0}
    assert run("clear", "reference", "tokens").exit_code == 0
    assert outside.exists()
