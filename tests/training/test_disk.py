"""A disk that fails at any operation leaves the old state or the new one, and a full one loses no training.

The sweep fails every single operation of saving and rotating, of whole runs, of resuming and of merging in turn.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Outcome, outcome, preference_rows, rows_of, write_jsonl
from faulty_disk import KINDS, FaultyDisk, Killed

import qpref
from qpref import fsio
from qpref.errors import DiskError, QprefError
from qpref.hooks.types import SinkContext
from qpref.merging.merge import merge_run
from qpref.merging.request import MergeRequest
from qpref.records import MetricRow
from qpref.training import checkpoint, optim
from qpref.training.checkpoint import Checkpoint, save_checkpoint
from qpref.training.metrics import Recorder

STEPS = 4
ADAPTER = Path("adapter") / "adapter_model.safetensors"

Recipe = dict[str, dict[str, object]]


# Saving and rotating: every operation, every way to fail.


def state_of(step: int) -> Checkpoint:
    """A small checkpoint, whose content is its step."""
    tensors = {"adapter": {"a": torch.full((64,), float(step))}, "optimizer": {"m": torch.full((16,), -float(step))}}
    return Checkpoint(step=step, state={"best": None, "fingerprints": {}}, tensors=tensors)


def steps_in(folder: Path) -> list[int]:
    """The steps whose checkpoints verify, oldest first."""
    found = []
    for path in sorted(folder.iterdir()):
        if checkpoint.NAME.fullmatch(path.name):
            try:
                saved = checkpoint.read(path)
            except QprefError:
                continue
            assert saved.tensors["adapter"]["a"].unique().tolist() == [saved.step]
            found.append(saved.step)
    return found


@pytest.fixture
def saved(tmp_path) -> Path:
    folder = tmp_path / "checkpoints"
    for step in (1, 2, 3):
        save_checkpoint(folder, state_of(step), keep=2)
    return folder


def num_save_operations(saved: Path) -> int:
    copy = saved.with_name("counted")
    shutil.copytree(saved, copy)
    with FaultyDisk(copy).installed() as disk:
        save_checkpoint(copy, state_of(4), keep=2)
    assert {"open", "write", "fsync", "rename", "mkdir", "unlink", "rmdir"} <= set(disk.names)
    return disk.count


@pytest.mark.parametrize("kind", KINDS)
def test_a_save_that_fails_anywhere_leaves_the_old_checkpoints_or_the_new_one(saved, kind):
    count = num_save_operations(saved)
    assert count >= 35
    for at in range(1, count + 1):
        folder = saved.with_name(f"{kind}-{at}")
        shutil.copytree(saved, folder)
        refused = False
        with FaultyDisk(folder, at, kind).installed():
            try:
                save_checkpoint(folder, state_of(4), keep=2)
            except (DiskError, Killed):
                refused = True
        left = steps_in(folder)
        assert left in ([2, 3], [2, 3, 4], [3, 4]), (at, left)
        assert refused or left[-1] == 4, at
        checkpoint.remove_leftovers(folder)
        save_checkpoint(folder, state_of(5), keep=2)
        assert steps_in(folder)[-2:] == [left[-1], 5]
        assert checkpoint.foreign_files(folder) == []
        shutil.rmtree(folder)


def test_a_save_asks_for_half_as_much_space_again_as_it_takes(saved, monkeypatch):
    needed = int(1.5 * 80 * 4)  # 64 + 16 float32 values
    for free, fits in ((needed - 1, False), (needed, True)):
        monkeypatch.setattr(shutil, "disk_usage", lambda path, free=free: shutil._ntuple_diskusage(10**9, 0, free))
        if fits:
            save_checkpoint(saved, state_of(4), keep=2)
        else:
            with pytest.raises(DiskError, match=r"step-000004: needs 480 bytes, and 479 bytes are free"):
                save_checkpoint(saved, state_of(4), keep=2)
            assert steps_in(saved) == [2, 3]


def test_an_unknown_size_of_the_disk_refuses_no_save(saved, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(0, 0, 0))
    save_checkpoint(saved, state_of(4), keep=2)
    assert steps_in(saved) == [3, 4]


def test_an_old_checkpoint_that_cannot_be_removed_is_named_and_the_save_counts(saved, monkeypatch, said):
    real = shutil.rmtree

    def rmtree(path: Path, *arguments: object, **options: object) -> None:
        failing(errno.EIO)() if path.name == "step-000002" else real(path, *arguments, **options)

    monkeypatch.setattr(shutil, "rmtree", rmtree)
    assert save_checkpoint(saved, state_of(4), keep=2).name == "step-000004"
    assert said == [f"an old checkpoint stays: {saved}/step-000002: cannot be written: Input/output error"]


def failing(number: int) -> Callable[..., None]:
    def fail(*arguments: object, **options: object) -> None:
        raise OSError(number, os.strerror(number))

    return fail


# Whole runs: a refused save is put off, the second in a row ends the run.


@pytest.fixture(scope="module")
def make_toy(make_base, tmp_path_factory) -> Callable[..., Recipe]:
    """`make_toy(save_every=1)`: 4 steps with dropout, a row and a checkpoint every step, no held-out data."""
    folder = tmp_path_factory.mktemp("toy")
    train = write_jsonl(folder / "train.jsonl", preference_rows(8))
    heldout = write_jsonl(folder / "heldout.jsonl", preference_rows(2, start=100))

    def make(is_evaluated: bool = False, **settings: object) -> Recipe:
        data = {"train": str(train)} | ({"heldout": str(heldout)} if is_evaluated else {})
        train_section = {
            "learning_rate": 1e-3, "batch_size": 2, "max_steps": STEPS, "log_every": 1, "save_every": 1, "keep": 2,
            "tokens_per_microbatch": 400, "gradient_checkpointing": False,
        }  # fmt: skip
        return {
            "model": {"base": str(make_base()), "quantization": "none", "dtype": "float32"},
            "adapter": {"rank": 2, "alpha": 4, "dropout": 0.1},
            "data": data,
            "checks": {"too_short": "off"},
            "loss": {"name": "dpo", "beta": 0.1},
            "train": train_section | settings,
            "sinks": [],
        }

    return make


@pytest.fixture(scope="module")
def unbroken(make_toy, tmp_path_factory) -> Outcome:
    return outcome(qpref.train(make_toy(), output=tmp_path_factory.mktemp("unbroken") / "run").path)


@contextmanager
def refusing(*steps: int) -> Iterator[None]:
    """A disk that is full when these steps are first saved, and has space again after each."""
    real, left = checkpoint.save_checkpoint, set(steps)

    def save(folder: Path, current: Checkpoint, keep: int) -> Path:
        with pytest.MonkeyPatch.context() as full:
            if current.step in left:
                left.remove(current.step)
                full.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 1234))
            return real(folder, current, keep)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "save_checkpoint", save)
        yield


@pytest.mark.parametrize("step", [1, 3])
def test_a_refused_save_is_put_off_to_the_next(make_toy, unbroken, tmp_path, said, step):
    with refusing(step):
        folder = qpref.train(make_toy(), output=tmp_path / "run").path
    assert outcome(folder) == unbroken
    (line,) = (line for line in said if "not saved" in line)
    path = f"{folder}/checkpoints/step-{step:06}"
    assert line.startswith(f"step {step} is not saved: {path}: needs ")
    assert line.endswith(" KiB, and 1.2 KiB are free; training continues, and the next save retries")


def test_the_second_refusal_in_a_row_ends_the_run_and_says_what_would_be_enough(make_toy, unbroken, tmp_path):
    with refusing(2, 3), pytest.raises(DiskError) as caught:
        qpref.train(make_toy(), output=tmp_path / "run")
    assert caught.value.exit_code == 8
    path = tmp_path / "run/checkpoints/step-000003"
    assert re.fullmatch(
        rf"step 3 is not saved, and neither was step 2: {path}: needs \d+\.\d KiB, and 1\.2 KiB are free\n"
        r"hint: free some space; a run continues with resume=True",
        str(caught.value),
    )
    assert [path.name for path in (tmp_path / "run/checkpoints").iterdir()] == ["step-000001"]
    assert outcome(qpref.train(make_toy(), output=tmp_path / "run", resume=True).path) == unbroken


def test_two_refusals_that_are_not_in_a_row_end_nothing(make_toy, unbroken, tmp_path):
    with refusing(1, 3):
        assert outcome(qpref.train(make_toy(), output=tmp_path / "run").path) == unbroken


def test_a_refused_last_save_leaves_the_adapter(make_toy, unbroken, tmp_path, said):
    with refusing(STEPS):
        folder = qpref.train(make_toy(), output=tmp_path / "run").path
    assert (folder / ADAPTER).read_bytes() == unbroken.adapter
    assert rows_of(folder) == unbroken.rows
    assert any("the adapter is written all the same" in line for line in said)


def test_a_stopped_run_that_cannot_be_saved_says_so_at_once(make_toy, unbroken, tmp_path, monkeypatch):
    real = optim.seed_step

    def seed_step(seed: int, step: int) -> None:
        if step == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        real(seed, step)

    monkeypatch.setattr(optim, "seed_step", seed_step)
    with refusing(2), pytest.raises(DiskError, match=r"^step 2 is not saved: .* needs .* free"):
        qpref.train(make_toy(), output=tmp_path / "run")
    monkeypatch.undo()
    assert outcome(qpref.train(make_toy(), output=tmp_path / "run", resume=True).path) == unbroken


def test_a_best_step_whose_save_was_refused_is_still_the_result(make_toy, tmp_path):
    # The held-out loss moves one way, so under one of the two directions the first step is the best.
    ways = {direction: {"best_by": "eval_loss", "best_direction": direction} for direction in ("min", "max")}
    (first,) = (settings for settings in ways.values() if best_of(make_toy, tmp_path / "found", settings) == 1)
    whole = qpref.train(make_toy(True, eval_every=1, **first), output=tmp_path / "whole").path
    with refusing(1):
        folder = qpref.train(make_toy(True, eval_every=1, **first), output=tmp_path / "run").path
    assert json.loads((folder / "result.json").read_text())["adapter_step"] == 1
    assert (folder / ADAPTER).read_bytes() == (whole / ADAPTER).read_bytes()


def best_of(make_toy: Callable[..., Recipe], folder: Path, settings: dict[str, object]) -> int:
    """The best step of a run with these settings."""
    run = qpref.train(make_toy(True, eval_every=1, **settings), output=folder / str(settings["best_direction"])).path
    return int(json.loads((run / "result.json").read_text())["adapter_step"])


# metrics.jsonl


class Full:
    """A file on a full disk: it takes a few bytes more, and is cut off or isn't."""

    def __init__(self, file: Any, space: int, is_cut: bool) -> None:
        self._file, self._space, self._is_cut = file, space, is_cut

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def write(self, data: bytes) -> int:
        if not self._space:
            failing(errno.ENOSPC)()
        taken = self._file.write(bytes(data)[: self._space])
        self._space -= taken
        return taken

    def truncate(self, size: int) -> None:
        self._file.truncate(size) if self._is_cut else failing(errno.EIO)()


@pytest.mark.parametrize("is_cut", [True, False], ids=["cut off at once", "cut off later"])
@pytest.mark.parametrize("num_refused", [1, 3])
def test_rows_that_the_disk_refuses_are_written_when_there_is_space(tmp_path, said, is_cut, num_refused):
    recorder = Recorder(
        tmp_path / "metrics.jsonl", 0, (), SinkContext(run_folder=tmp_path, first_step=0, total_steps=9)
    )
    recorder.write(row_of(0))
    before, file = recorder.size, recorder._lines._file
    recorder._lines._file = Full(file, 5, is_cut)
    for step in range(1, 1 + num_refused):
        recorder.write(row_of(step))
        assert not is_cut or (tmp_path / "metrics.jsonl").stat().st_size == before
    with pytest.raises(DiskError):
        recorder.flush()
    assert recorder.size == before
    recorder._lines._file = file
    recorder.write(row_of(8))
    recorder.close()
    steps = [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert steps == [0, *range(1, 1 + num_refused), 8]
    assert len(said) == 1
    assert "metrics.jsonl: cannot be written: No space left on device (" in said[0]


def row_of(step: int) -> MetricRow:
    return MetricRow(step=step, split="train", values={"loss": 0.5}, tokens=step, seconds=0.0)


def test_a_run_whose_rows_can_never_be_written_is_not_done(make_toy, unbroken, tmp_path, monkeypatch):
    real = fsio.AppendLog.append

    def append(log: fsio.AppendLog, data: bytes, durable: bool = True) -> None:
        if log._path.name == "metrics.jsonl" and b'"step": 4' in data:
            raise DiskError(f"{log._path}: cannot be written: Input/output error")
        real(log, data, durable)

    monkeypatch.setattr(fsio.AppendLog, "append", append)
    with pytest.raises(DiskError, match=r"metrics\.jsonl"):
        qpref.train(make_toy(), output=tmp_path / "run")
    monkeypatch.undo()
    assert outcome(qpref.train(make_toy(), output=tmp_path / "run", resume=True).path) == unbroken


# Every operation of whole runs.


def train_on(recipe: Recipe, folder: Path, at: int = 0, kind: str = "crash") -> FaultyDisk:
    """Train on a disk that fails; a run that it ends is in the folder as it was then, and one that is there resumes."""
    resume = folder.exists()
    with FaultyDisk(folder, at, kind).installed() as disk, suppress(Killed, DiskError):
        qpref.train(recipe, output=folder, resume=resume)
    return disk


def check_resumes(recipe: Recipe, folder: Path, unbroken: Outcome, where: object) -> None:
    """Resume a run that a disk has ended, or see that it has ended itself."""
    done = qpref.train(recipe, output=folder, resume=True).path
    assert (done / ADAPTER).read_bytes() == unbroken.adapter, where
    assert rows_of(done) == unbroken.rows, where
    assert not [path for path in done.rglob(".tmp-*") if num_bytes(path)], where
    shutil.rmtree(folder)


def sweep(recipe: Recipe, unbroken: Outcome, begun: Path, every: int) -> int:
    """Fail every so many operations of a run, one kind after the other, or all kinds where every operation fails.

    Args:
        begun: folder of the run as it starts: one that doesn't exist, or a killed run.

    Returns:
        Number of failures.
    """
    count, done = num_operations(recipe, begun), 0
    for number, at in enumerate(range(1, count + 1, every)):
        for kind in KINDS if every == 1 else (KINDS[number % len(KINDS)],):
            folder = copied(begun, f"{kind}-{at}")
            disk = train_on(recipe, folder, at, kind)
            check_resumes(recipe, folder, unbroken, (kind, at, disk.names[at - 1]))
            done += 1
    return done


def num_operations(recipe: Recipe, begun: Path) -> int:
    count = train_on(recipe, copied(begun, "counted")).count
    assert count > 100
    return count


def copied(begun: Path, name: str) -> Path:
    folder = begun.with_name(name)
    if begun.exists():
        shutil.copytree(begun, folder)
    return folder


@pytest.fixture
def killed(make_toy, tmp_path) -> Path:
    """A run that was killed while its second step was saved."""
    real = checkpoint.save_checkpoint

    def save(folder: Path, current: Checkpoint, keep: int) -> Path:
        if current.step == 2:
            raise Killed
        return real(folder, current, keep)

    with pytest.MonkeyPatch.context() as patch, suppress(Killed):
        patch.setattr(checkpoint, "save_checkpoint", save)
        qpref.train(make_toy(), output=tmp_path / "killed")
    return tmp_path / "killed"


def test_a_disk_that_fails_during_a_run_costs_no_step(make_toy, unbroken, tmp_path):
    assert sweep(make_toy(), unbroken, tmp_path / "new", every=43) >= 4


def test_a_disk_that_fails_during_a_resume_costs_no_step(make_toy, unbroken, killed):
    assert sweep(make_toy(), unbroken, killed, every=37) >= 4


@pytest.mark.soak
def test_a_disk_that_fails_at_any_operation_of_a_run_costs_no_step(make_toy, unbroken, tmp_path):
    assert sweep(make_toy(), unbroken, tmp_path / "new", every=1) >= 400


@pytest.mark.soak
def test_a_disk_that_fails_at_any_operation_of_a_resume_costs_no_step(make_toy, unbroken, killed):
    assert sweep(make_toy(), unbroken, killed, every=1) >= 400


# Merging.


def merge_on(run: Path, out: Path, at: int = 0, kind: str = "crash") -> FaultyDisk:
    with FaultyDisk(out.parent, at, kind).installed() as disk, suppress(Killed, DiskError):
        merge_run(MergeRequest(run=run, out=out, dtype="float32"))
    return disk


def sweep_merge(run: Path, tmp_path: Path, every: int) -> int:
    """Fail every so many operations of a merge: the folder is whole or not there, and a second merge makes it."""
    whole = tmp_path / "whole" / "out"
    count, done = merge_on(run, whole).count, 0
    assert count > 20
    for number, at in enumerate(range(1, count + 1, every)):
        for kind in KINDS if every == 1 else (KINDS[number % len(KINDS)],):
            out = tmp_path / f"{kind}-{at}" / "out"
            merge_on(run, out, at, kind)
            if not out.exists():
                merge_on(run, out)
            assert content(out) == content(whole), (kind, at)
            left = [path for path in out.parent.iterdir() if path != out]
            assert not [path for path in left if num_bytes(path) or fsio.staged_name(path.name) != "out"], (kind, at)
            done += 1
    return done


def num_bytes(path: Path) -> int:
    """Bytes of the files at or below a path."""
    return sum(file.stat().st_size for file in (path, *path.rglob("*")) if file.is_file())


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "merge.json"}


def test_a_disk_that_fails_during_a_merge_leaves_a_whole_model_or_none(trained_run, tmp_path):
    assert sweep_merge(trained_run(), tmp_path, every=17) >= 4


@pytest.mark.soak
def test_a_disk_that_fails_at_any_operation_of_a_merge_leaves_a_whole_model_or_none(trained_run, tmp_path):
    assert sweep_merge(trained_run(), tmp_path, every=1) >= 150
