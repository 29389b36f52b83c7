"""SIGKILL at each operation on the disk of saving and rotating, resuming, exporting and merging.

A fork of this process kills itself there, half of a write done. What is found then is the old state or the new one,
and the same command once more makes the new one.
"""

from __future__ import annotations

import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import Outcome, outcome, rows_of
from faulty_disk import FaultyDisk
from forks import exit_code, forked
from tally import STEPS, Tally
from test_disk import content, make_toy, num_bytes, state_of, steps_in, unbroken  # noqa: F401 - two fixtures
from test_kills import last_step, newest_step

import qpref
from qpref import fsio
from qpref.merging.export import export_gguf
from qpref.merging.merge import merge_run
from qpref.merging.request import MergeRequest
from qpref.training import checkpoint
from qpref.training.checkpoint import save_checkpoint

SAVE_EVERY = 2
CONVERTER = """
import pathlib, sys
values = dict(zip(sys.argv[2::2], sys.argv[3::2]))
pathlib.Path(values["--outfile"]).write_bytes(b"GGUF" + pathlib.Path(sys.argv[1], "model.safetensors").read_bytes())
"""

Work = Callable[[Path], object]


def num_operations(folder: Path, work: Work) -> int:
    """Run `work` to its end in a folder, and count its operations on the disk."""
    with FaultyDisk(folder).installed() as disk:
        work(folder)
    return disk.count


def kill(folder: Path, at: int, work: Work, tally: Tally) -> None:
    """Run `work` in a process that SIGKILL ends at its operation `at`."""

    def killed() -> None:
        with FaultyDisk(folder, at, "SIGKILL").installed():
            work(folder)

    assert exit_code(forked(killed)) == -signal.SIGKILL
    tally["SIGKILLs at chosen operations"] += 1


def each(count: int, every: int) -> range:
    """Numbers of every so many of `count` operations, the last one included."""
    return range(count, 0, -every)


def in_copies(begun: Path, every: int, work: Work, tally: Tally, first: int = 0) -> list[Path]:
    """Kill `work` at every so many of its operations, each in a copy of the folder `begun`; returns the copies.

    Args:
        first: number of operations at its start of which each is killed.
    """
    whole = Path(shutil.copytree(begun, begun.with_name("whole")))
    count = num_operations(whole, work)
    copies = []
    for at in sorted({*each(count, every), *range(1, first + 1)}):
        copies.append(Path(shutil.copytree(begun, begun.with_name(f"killed-{at}"))))
        kill(copies[-1], at, work, tally)
    return copies


# Saving and rotating.


def test_a_rotation_killed_at_any_operation_keeps_two_checkpoints(tmp_path, tally):
    begun = tmp_path / "checkpoints"
    for step in (1, 2, 3):
        save_checkpoint(begun, state_of(step), keep=2)
    found = set()
    for folder in in_copies(begun, 1, lambda folder: save_checkpoint(folder, state_of(4), keep=2), tally):
        left = steps_in(folder)
        assert left in ([2, 3], [2, 3, 4], [3, 4])
        found.add(tuple(left))
        checkpoint.remove_leftovers(folder)
        save_checkpoint(folder, state_of(5), keep=2)
        assert steps_in(folder)[-2:] == [left[-1], 5]
        assert checkpoint.foreign_files(folder) == []
    assert found == {(2, 3), (2, 3, 4), (3, 4)}


# Training: what a run writes as it begins, as it resumes, and as it exports its adapter.


def train(make_toy: Callable[..., dict[str, dict[str, object]]]) -> Work:  # noqa: F811
    recipe = make_toy()
    return lambda folder: qpref.train(recipe, output=folder, resume=True)


def check_resumes(work: Work, folders: list[Path], unbroken: Outcome, tally: Tally) -> None:  # noqa: F811
    """Resume each killed run once more: it ends as the one that never stopped."""
    for folder in folders:
        tally[STEPS] += max(0, last_step(folder) - newest_step(folder) - 1)  # a save every step
        work(folder)
        tally.compare_rows(rows_of(folder), unbroken.rows)
        assert outcome(folder) == unbroken
        assert not list(folder.rglob(".tmp-*"))
        shutil.rmtree(folder)


@pytest.mark.parametrize("every", [23, pytest.param(1, marks=pytest.mark.soak)])
def test_a_run_killed_at_any_operation_ends_as_if_it_never_stopped(make_toy, unbroken, tmp_path, tally, every):  # noqa: F811
    work, begun = train(make_toy), tmp_path / "new"
    begun.mkdir()
    check_resumes(work, in_copies(begun, every, work, tally), unbroken, tally)


@pytest.mark.parametrize("every", [17, pytest.param(1, marks=pytest.mark.soak)])
def test_a_resumption_killed_at_any_operation_ends_as_if_it_never_stopped(make_toy, unbroken, tmp_path, tally, every):  # noqa: F811
    work, begun = train(make_toy), tmp_path / "begun"
    work(begun)
    for newest in sorted((begun / "checkpoints").iterdir())[1:]:
        shutil.rmtree(newest)
    shutil.rmtree(begun / "adapter")
    (begun / "result.json").unlink()
    (begun / "checkpoints" / fsio.staging_name(Path("step-000004")).name).mkdir()
    check_resumes(work, in_copies(begun, every, work, tally), unbroken, tally)


@pytest.mark.parametrize("every", [200, pytest.param(1, marks=pytest.mark.soak)])
@pytest.mark.parametrize("again", [{"resume": True}, {"overwrite": True}], ids=str)
def test_a_run_that_is_killed_while_it_starts_over_can_start_over(
    make_toy,  # noqa: F811
    unbroken,  # noqa: F811
    tmp_path,
    tally,
    again,
    every,
):
    """Without a checkpoint, --resume removes what there is and starts over, as --overwrite does: 12 operations."""
    recipe, begun = make_toy(), tmp_path / "begun"
    qpref.train(recipe, output=begun)
    for name in ("checkpoints", "adapter"):
        shutil.rmtree(begun / name)
    (begun / "result.json").unlink()
    first_row, *_ = (begun / "metrics.jsonl").read_text().splitlines(keepends=True)
    (begun / "metrics.jsonl").write_text(first_row)
    copies = in_copies(begun, every, lambda folder: qpref.train(recipe, output=folder, **again), tally, first=12)
    check_resumes(train(make_toy), copies, unbroken, tally)


@pytest.mark.parametrize("every", [9, pytest.param(1, marks=pytest.mark.soak)])
def test_an_adapter_whose_export_is_killed_is_exported_again(make_toy, unbroken, tmp_path, tally, every):  # noqa: F811
    """A finished run whose adapter is damaged: --resume writes it, and the run's records, from the last checkpoint."""
    work, begun = train(make_toy), tmp_path / "begun"
    work(begun)
    (begun / "adapter/adapter_model.safetensors").write_bytes(b"damaged")
    check_resumes(work, in_copies(begun, every, work, tally), unbroken, tally)


# Merged models and GGUF files.


def check_appears(work: Work, begun: Path, every: int, tally: Tally) -> None:
    """Kill `work`, which makes `out` in a folder, at every so many operations: `out` is whole or not there."""
    copies = in_copies(begun, every, work, tally)
    whole = contents_of(begun.with_name("whole") / "out")
    for folder in copies:
        out = folder / "out"
        if out.exists():
            assert contents_of(out) == whole
        else:
            work(folder)
        assert contents_of(out) == whole
        left = [path for path in folder.iterdir() if path.name.startswith(".tmp-")]
        assert not [path for path in left if num_bytes(path) or fsio.staged_name(path.name) != "out"]
        shutil.rmtree(folder)


def contents_of(path: Path) -> dict[str, bytes]:
    return content(path) if path.is_dir() else {path.name: path.read_bytes()}


@pytest.mark.parametrize("every", [15, pytest.param(1, marks=pytest.mark.soak)])
def test_a_merge_killed_at_any_operation_leaves_a_whole_model_or_none(trained_run, tmp_path, tally, every):
    run, begun = trained_run(), tmp_path / "begun"
    begun.mkdir()
    check_appears(
        lambda folder: merge_run(MergeRequest(run=run, out=folder / "out", dtype="float32")), begun, every, tally
    )


def test_an_export_killed_at_any_operation_leaves_a_whole_file_or_none(make_base, tmp_path, tally):
    model, converter, begun = make_base(), tmp_path / "convert_hf_to_gguf.py", tmp_path / "begun"
    converter.write_text(CONVERTER)
    begun.mkdir()
    check_appears(lambda folder: export_gguf(model, folder / "out", converter=converter), begun, 1, tally)
