"""Real disks that are full: file systems in memory of ten sizes, mounted in a namespace of a child process.

Where the machine allows no mounts, a limit on the size of files stands for them.
"""

from __future__ import annotations

import json
import logging
import os
import resource
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from forks import CLONE_NEWNS, LIBC, enter_namespaces

from qpref import fsio
from qpref.errors import DiskError
from qpref.policy.reference_cache import ReferenceCache
from qpref.policy.source import cached_sha256
from qpref.training import checkpoint
from qpref.training.checkpoint import Checkpoint, save_checkpoint

MS_RDONLY, MS_REMOUNT = 1, 32
CHECKPOINT_KIB = 64
SIZES_KIB = (16, 64, 96, 128, 160, 192, 256, 320, 448, 1024)


def in_namespace(work: Callable[[], Any]) -> Any:
    """Run `work` in a child process that may mount; returns its result, or raises its error."""
    reading, writing = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # the child uses one thread alone
        child = os.fork()
    if child == 0:
        try:
            enter_namespaces(CLONE_NEWNS)  # where it isn't allowed, mounts aren't either
            result = {"result": work()}
        except BaseException:  # noqa: BLE001 - everything goes to the parent
            result = {"error": traceback.format_exc()}
        os.write(writing, json.dumps(result).encode())
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as file:
        found = json.load(file)
    os.waitpid(child, 0)
    assert "error" not in found, found["error"]
    return found["result"]


def mount(folder: Path, kib: int) -> bool:
    """Mount a file system of so many KiB; False where that isn't allowed."""
    folder.mkdir()
    return not LIBC.mount(b"tmpfs", bytes(folder), b"tmpfs", 0, f"size={kib}k".encode())


def read_only(folder: Path) -> bool:
    return not LIBC.mount(b"tmpfs", bytes(folder), b"tmpfs", MS_REMOUNT | MS_RDONLY, None)


def state_of(step: int) -> Checkpoint:
    tensors = {"adapter": {"a": torch.full((CHECKPOINT_KIB * 256,), float(step))}}
    return Checkpoint(step=step, state={"best": None, "fingerprints": {}}, tensors=tensors)


def good_steps(folder: Path) -> list[int]:
    return [checkpoint.read(path).step for path in sorted(folder.glob("step-*"))]


def fill(folder: Path, kib: int) -> dict[str, Any]:
    """Save five checkpoints to a disk of so many KiB, keeping two, and then one more once there is space."""
    disk = folder / f"disk-{kib}"
    is_mounted = mount(disk, kib)
    if not is_mounted:
        resource.setrlimit(resource.RLIMIT_FSIZE, (kib * 512, resource.RLIM_INFINITY))
    saved, refused = [], []
    checkpoints = disk / "checkpoints"
    for step in range(1, 6):
        before = good_steps(checkpoints) if checkpoints.is_dir() else []
        try:
            save_checkpoint(checkpoints, state_of(step), keep=2)
            saved.append(step)
        except DiskError as error:
            refused.append(str(error))
            assert good_steps(checkpoints) == before if checkpoints.is_dir() else not before
    left = good_steps(checkpoints) if checkpoints.is_dir() else []
    leftovers = [path.name for path in disk.rglob(".tmp-*")]
    if is_mounted:
        assert not LIBC.mount(b"tmpfs", bytes(disk), b"tmpfs", MS_REMOUNT, b"size=4m")
    else:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    save_checkpoint(checkpoints, state_of(6), keep=2)
    assert good_steps(checkpoints)[-1] == 6
    return {"mounted": is_mounted, "kib": kib, "saved": saved, "refused": refused, "left": left, "leftovers": leftovers}


def test_disks_of_ten_sizes_keep_their_last_good_checkpoints(tmp_path):
    results = in_namespace(lambda: [fill(tmp_path, kib) for kib in SIZES_KIB])
    assert len(results) == 10
    assert not results[0]["saved"]
    assert results[-1]["saved"] == [1, 2, 3, 4, 5]
    assert any(0 < len(one["saved"]) < 5 for one in results if one["mounted"]) or not results[0]["mounted"]
    for one in results:
        assert one["left"] == one["saved"][-2:], one
        assert len(one["saved"]) + len(one["refused"]) == 5
        assert one["leftovers"] == []
        for message in one["refused"]:
            assert "disk-" in message
            assert ("needs 96.0 KiB, and" in message) or ("needed, " in message) or ("ulimit -f" in message)


def test_a_cache_on_a_disk_that_may_only_be_read_is_read(tmp_path):
    def work() -> dict[str, Any]:
        cache = tmp_path / "cache"
        if not mount(cache, 1024):
            return {"mounted": False}
        os.environ["QPREF_CACHE"] = str(cache)
        file = tmp_path / "weights"
        file.write_bytes(b"weights")
        digest = cached_sha256(file)
        rows = {bytes([number]) * 16: torch.full((3,), float(number)) for number in range(4)}
        first = ReferenceCache.open(cache / "reference" / "r", "a" * 32)
        first.add(rows)
        first.close()
        assert read_only(cache)
        lines: list[str] = []
        handler = logging.Handler()
        handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
        logging.getLogger("qpref").handlers = [handler]
        fsio._read_only.clear()
        second = ReferenceCache.open(cache / "reference" / "r", "b" * 32)
        found = [key in second for key in rows]
        second.add({b"n" * 16: torch.zeros(3)})
        second.close()
        other = tmp_path / "other"
        other.write_bytes(b"other")
        return {
            "mounted": True,
            "found": found,
            "digests": [cached_sha256(file) == digest, len(cached_sha256(other)) == 64],
            "lines": lines,
        }

    result = in_namespace(work)
    if result.pop("mounted"):
        assert result["found"] == [True] * 4
        assert result["digests"] == [True, True]
        assert len(result["lines"]) == 1
        assert result["lines"][0].startswith("the cache is no longer written: ")
        assert "Read-only file system" in result["lines"][0]
