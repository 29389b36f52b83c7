"""Damage to any file of a run and of its cache is named by what reads the file, or what was read is the same."""

from __future__ import annotations

import hashlib
import random
import shutil
from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path

import pytest

from qpref import publish, shards
from qpref.errors import QprefError
from qpref.policy.source import cached_sha256
from qpref.shards import ShardStore
from qpref.training import checkpoint
from qpref.training.folder import RunFolder
from qpref.training.snapshot import metrics_bytes

NUM_DAMAGES = 2000
CONVERTED = {
    "config.json": b'{"hidden_size": 64}',
    "model.safetensors": bytes(range(256)) * 40,
    "tokenizer.json": b"{}",
}


class Named(Exception):
    """Damage that the reader has named."""


def named(problem: str | None) -> None:
    if problem is not None:
        raise Named(problem)


def description(root: Path) -> object:
    return RunFolder(root / "run").description()


def recipe(root: Path) -> object:
    folder = RunFolder(root / "run")
    return folder.document(folder.description())


def data_report(root: Path) -> object:
    folder = RunFolder(root / "run")
    facts = folder.description()
    if not folder.data_json.exists():
        raise Named("data.json is missing, and all checks are repeated")
    return folder.recorded({}, facts).report


def adapter(root: Path) -> object:
    named(RunFolder(root / "run").adapter_damage())
    return None


def newest_checkpoint(root: Path) -> object:
    folder = RunFolder(root / "run").checkpoints
    return [checkpoint.read(path).state for path in sorted(folder.glob("step-*"))]


def metrics(root: Path) -> object:
    folder = RunFolder(root / "run")
    named(folder.changed_metrics())
    kept = metrics_bytes(checkpoint.read(max(folder.checkpoints.iterdir())), folder)
    return folder.metrics.read_bytes()[:kept]


def converted_base(root: Path) -> object:
    named(publish.damaged_file(root / "cache/models/converted"))
    return None


def hashes(root: Path) -> object:
    """What a reader gets: a damaged entry is computed again."""
    return cached_sha256(root / "weights")


def shard_records(root: Path) -> object:
    """Records that are lost are computed again; one that is read is as it was written."""
    store = ShardStore.open(root / "cache/reference", "0" * 32, loss_level=0)
    found = {key: store.get(key) for key in RECORDS_OF_SHARD if key in store}
    if any(found[key] != RECORDS_OF_SHARD[key] for key in found):
        return found
    return RECORDS_OF_SHARD


RECORDS_OF_SHARD = {bytes([number]) * shards.KEY_BYTES: bytes([number] * 40) for number in range(20)}
READERS: dict[str, Callable[[Path], object] | None] = {
    "run/run.json": description,
    "run/recipe.lock.toml": recipe,
    "run/data.json": data_report,
    "run/adapter/README.md": None,  # a card, which people edit
    "run/adapter/*": adapter,
    "run/result.json": adapter,
    "run/metrics.jsonl": metrics,
    "run/checkpoints/step-*": newest_checkpoint,
    "run/LOCK": None,  # holds nothing that is read back but in a message
    "cache/models/*": converted_base,
    "cache/reference/*.shard": shard_records,
    "cache/sha256/*": hashes,
}


def reader_of(name: str) -> Callable[[Path], object] | None:
    return next(reader for pattern, reader in READERS.items() if fnmatch(name, pattern))


def flip(data: bytearray, draw: random.Random) -> bytes:
    data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    return bytes(data)


def cut(data: bytearray, draw: random.Random) -> bytes:
    return bytes(data[: draw.randrange(len(data))])


def zero_a_page(data: bytearray, draw: random.Random) -> bytes:
    start = draw.randrange(len(data)) // 512 * 512
    return bytes(data[:start]) + bytes(len(data[start : start + 512])) + bytes(data[start + 512 :])


KINDS = (flip, flip, flip, cut, zero_a_page)


@pytest.fixture
def root(trained_run, tmp_path, monkeypatch) -> Path:
    """A run, and a cache with a converted base, the scores of a reference, and the hash of a large file."""
    shutil.copytree(trained_run(), tmp_path / "run", ignore=shutil.ignore_patterns("report.html"))
    monkeypatch.setenv("QPREF_CACHE", str(tmp_path / "cache"))
    with publish.shared_folder(tmp_path / "cache/models/converted") as staging:
        for name, content in CONVERTED.items():
            (staging / name).write_bytes(content)
    store = ShardStore.open(tmp_path / "cache/reference", "1" * 32)
    store.add(RECORDS_OF_SHARD)
    store.close()
    (tmp_path / "weights").write_bytes(bytes(1000))
    assert cached_sha256(tmp_path / "weights") == hashlib.sha256(bytes(1000)).hexdigest()
    return tmp_path


def outcome(read: Callable[[Path], object], root: Path, said: list[str]) -> object:
    """What a reader returns; None where it names damage in an error or a warning."""
    said.clear()
    try:
        value = read(root)
    except (QprefError, Named):
        return None
    return None if said else (value, "read")


def test_no_damage_is_silent(root, said, tally):
    draw = random.Random(17)
    files = sorted(path for top in ("run", "cache") for path in (root / top).rglob("*") if path.is_file())
    assert {
        next((pattern for pattern in READERS if fnmatch(str(path.relative_to(root)), pattern)), path) for path in files
    } == (READERS.keys())
    readers = {path: read for path in files if (read := reader_of(str(path.relative_to(root)))) and path.stat().st_size}
    expected = {read: outcome(read, root, said) for read in set(readers.values())}
    assert None not in expected.values()
    silent, num_named = [], 0
    for number in range(NUM_DAMAGES):
        path = sorted(readers)[number % len(readers)]
        content, times = path.read_bytes(), path.stat()
        kind = draw.choice(KINDS)
        damaged = kind(bytearray(content), draw)
        path.write_bytes(damaged)
        found = outcome(readers[path], root, said)
        num_named += found is None
        if found not in (None, expected[readers[path]]):
            silent.append((str(path.relative_to(root)), kind.__name__))
        path.write_bytes(content)
        assert times.st_size == path.stat().st_size
    assert silent == []
    tally["damaged files"] += NUM_DAMAGES
    assert (
        num_named > 0.7 * NUM_DAMAGES
    )  # the rest were bytes that mean nothing, such as a space, or were computed again
